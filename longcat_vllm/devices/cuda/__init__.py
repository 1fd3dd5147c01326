"""All that a GPU does differently: MoE kernels that drop zero experts; the rest is vLLM's own."""
# SPDX-License-Identifier: Apache-2.0

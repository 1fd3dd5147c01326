"""All that a GPU does differently: SGLang's own MLA and MoE kernels, with our rotary table."""
# SPDX-License-Identifier: Apache-2.0

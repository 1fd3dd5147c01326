"""All that a CPU does differently: attention, FFN experts, patches of SGLang, what it refuses."""
# SPDX-License-Identifier: Apache-2.0

"""Kernels for CPUs in bf16, in C++, where torch has no quick operator. Each names the reference it must equal."""
# SPDX-License-Identifier: Apache-2.0

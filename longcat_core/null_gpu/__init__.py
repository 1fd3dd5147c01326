"""A GPU that accepts every call and computes nothing: CUDA builds run on it as they would on the GPU it claims to be.

It stands where NVIDIA's runtime and driver are. Memory is address space with the GPU's limit, so that a model of any
size is allocated and an allocation that would not fit fails; kernels are counted and not run; what the host writes to
the device it reads back. All code of an engine, of PyTorch and of extensions that runs on the host is the real one:
choices of kernels, checks of shapes and dtypes, sizes of buffers. No value that a kernel computes is known.
"""
# SPDX-License-Identifier: Apache-2.0

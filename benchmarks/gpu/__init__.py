"""What can be known of the kernels for GPUs on a machine without one."""
# SPDX-License-Identifier: Apache-2.0

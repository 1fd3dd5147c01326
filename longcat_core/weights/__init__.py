"""Published checkpoints: names of tensors, load plans, audits, files."""
# SPDX-License-Identifier: Apache-2.0

"""Every measured number of the documentation but Nano's: one script each, results as JSON."""
# SPDX-License-Identifier: Apache-2.0

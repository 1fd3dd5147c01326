"""What a deployment can be expected to do, computed from hardware as data. Nothing here was measured."""
# SPDX-License-Identifier: Apache-2.0

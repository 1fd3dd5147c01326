"""FP8 by the recipe of the report: which linear layers stay in bf16, measured, chosen and written."""
# SPDX-License-Identifier: Apache-2.0

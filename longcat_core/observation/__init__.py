"""What a running engine counts of LongCat's own: which experts its tokens take; and what it shows of a dial."""
# SPDX-License-Identifier: Apache-2.0

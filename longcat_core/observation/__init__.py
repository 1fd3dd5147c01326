"""What a running engine counts of LongCat's own: which experts its tokens take."""
# SPDX-License-Identifier: Apache-2.0

"""Drafts of the MTP layer: which of them are worth verifying (C2T)."""
# SPDX-License-Identifier: Apache-2.0

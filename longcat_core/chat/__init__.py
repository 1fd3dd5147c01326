"""What LongCat writes and reads in a chat: reasoning, tool calls in two forms, templates, grammars for guided decoding."""
# SPDX-License-Identifier: Apache-2.0

"""What LongCat reads and writes in a chat: reasoning, tool calls in two forms, templates, grammars of calls."""
# SPDX-License-Identifier: Apache-2.0

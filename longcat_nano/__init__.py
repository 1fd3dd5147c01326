"""LongCat-Nano: the shipped checkpoints, small and trained by `examples/nano`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")
"""Laid out as LongCat-Flash-Chat is published, with its gate for drafts; `examples/nano/record` has the record of its
training, which is not installed."""

TOOLS_CHECKPOINT = Path(__file__).with_name("tools_checkpoint")
"""`CHECKPOINT`, fine-tuned to call tools in the format of LongCat-Flash-Thinking-2601, without a gate;
`examples/nano/tools/record.json` is the record of its training, which is not installed."""

"""LongCat-Nano: the shipped checkpoint, a small LongCat-Flash that has learned something; `examples/nano` trains it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")
"""Laid out as LongCat-Flash-Chat is published, with its gate for drafts; `examples/nano/record` has the record of its
training, which is not installed."""

"""The names of what the HTTP tests count; each engine has its own."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import NamedTuple


class Metrics(NamedTuple):
    running: str
    waiting: str
    generated: str
    """Output tokens, counted while they come."""
    preemptions: str
    pruned: str
    """Drafts that a gate kept from verification."""
    verifications: str
    """Of drafts."""

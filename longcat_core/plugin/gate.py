"""Whether a server's drafts go through the checkpoint's draft gate: on request only, and never without saying so."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from longcat_core.drafting.gate import GATE_FILE, load
from longcat_core.plugin.engine import refuse


def uses_gate(
    directory: Path | None, is_requested: bool, obstacles: Sequence[str], option: str, log: logging.Logger
) -> bool:
    """Whether to use the gate; the engine's log says so. A gate that is not requested is not read.

    directory: of the checkpoint, None if it is not on this machine or there are no drafts; obstacles: what prevents the
    use of a gate; option: how a user requests it, as typed.

    Raises:
        ValueError: if a gate is requested and something prevents its use, or there is none.
        GateError: if it is another model's, or no gate.
    """
    if not is_requested:
        if directory is not None and (directory / GATE_FILE).exists():
            log.info("The checkpoint has a draft gate, which is used on request only: %s", option)
        return False
    refuse([f"{option}: {obstacle}; or leave the draft gate out" for obstacle in obstacles])
    gate = None if directory is None else load(directory)
    if gate is None:
        refuse([f"{option}: the checkpoint has no draft gate; train one with `longcat train-gate`, or leave it out"])
    assert gate is not None
    log.info("The checkpoint's draft gate prunes drafts with a score under %g.", gate.threshold)
    return True

"""What SGLang's completions take beside OpenAI's parameters, for `tests/engines/test_sampling_with_drafts.py`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any

BESIDE_ANOTHER: list[str] = ["--sleep-on-idle"]
"""Flags of a server that is not alone on its machine: SGLang keeps a core busy otherwise, also with nothing to do."""
PARAMETERS: dict[str, list[Any]] = {
    "stop_regex": ["[aeiou]{2}"],
    "no_stop_trim": [True],
}


def is_refused_with_drafts(request: dict[str, Any]) -> bool:
    return False


def guided(kind: str, value: Any) -> dict[str, Any]:
    if kind == "json":
        return {"json_schema": json.dumps(value)}
    return {"regex": "|".join(value) if kind == "choice" else value}

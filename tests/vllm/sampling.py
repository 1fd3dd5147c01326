"""What vLLM's completions take beside OpenAI's parameters, for `tests/engines/test_sampling_with_drafts.py`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

BESIDE_ANOTHER: list[str] = []
"""Flags of a server that is not alone on its machine: vLLM needs none."""
PARAMETERS: dict[str, list[Any]] = {
    "prompt_logprobs": [1],
    "bad_words": [["a", "the"]],
    "allowed_token_ids": [list(range(8, 200, 3))],
    "include_stop_str_in_output": [True],
}


def is_refused_with_drafts(request: dict[str, Any]) -> bool:
    """By vLLM's `SamplingParams._validate_spec_decode`; a greedy request has no `min_p`, whatever it says."""
    return "logit_bias" in request or ("min_p" in request and request["temperature"] > 0)


def guided(kind: str, value: Any) -> dict[str, Any]:
    return {"structured_outputs": {kind: value}}

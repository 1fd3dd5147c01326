"""What a user requests of longcat-serving itself, in SGLang's option that takes fields of any name."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from longcat_core.plugin.options import Option, Outcome
from longcat_core.plugin.requested import Requested
from longcat_sglang.engine import OVERLAP, OWN_CLASS

OPTIONS = {
    "draft_gate": """--json-model-override-args '{"longcat_draft_gate": true}'""",
    "kernels": """--json-model-override-args '{"longcat_kernels": true}'""",
    "ffn_experts": """--json-model-override-args '{"longcat_ffn_experts": NUMBER}'""",
    "full_queue": """--json-model-override-args '{"longcat_full_queue": NUMBER}'""",
}
"""As typed, by field of `Requested`. No other option of SGLang takes fields of any name, and reaches all processes."""
ON_REQUEST: tuple[Option, ...] = (
    Option(
        OPTIONS["kernels"],
        Outcome.SERVED,
        "Router and experts by longcat-serving's own kernels ([more](kernels.md)), on GPUs of compute capability 9.0 "
        "and more. Refused on a CPU, in float16, with another --moe-runner-backend than auto and triton, with "
        "--moe-a2a-backend or --enable-deterministic-inference, and if a rank has less than whole blocks of an expert "
        "in FP8.",
        "interpreted on a CPU, in the tests; no GPU has run it",
    ),
    Option(
        OPTIONS["ffn_experts"],
        Outcome.SERVED,
        "The mean of FFN experts a token is held at NUMBER in every layer ([more](dial.md)), or between two, as in "
        "`[5, 8]`, by the queue ([more](dial.md#by-the-queue)). Refused with --enable-dp-attention, --moe-a2a-backend "
        "and --enable-memory-saver, and for a mean that no bias holds.",
        "run on a CPU, in the tests; no GPU has run it",
    ),
    Option(
        OPTIONS["full_queue"],
        Outcome.SERVED,
        "So many requests wait where the lesser of two `longcat_ffn_experts` is the target; without it, as many as "
        "--max-running-requests. Refused without two.",
        "run on a CPU, in the tests; no GPU has run it",
    ),
)
"""Rows of the docs' table, for `options.OPTIONS`."""
_PREFIX = "longcat_"


def of(settings: Any) -> Requested:
    """
    settings: SGLang's `ServerArgs`, or what it has made of them.

    Raises:
        ValueError: for another name or value.
    """
    given = json.loads(settings.json_model_override_args)
    ours = {name: given[name] for name in given if name.startswith(_PREFIX) and name not in (OWN_CLASS, OVERLAP)}
    ours = {name.removeprefix(_PREFIX): value for name, value in ours.items()}
    asked = Requested.read(ours, OPTIONS, _PREFIX, "--json-model-override-args")
    return replace(asked, overlap=given.get(OVERLAP))


def current() -> Requested:
    """Of the model that is built now."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.runtime_context import get_server_args

    return of(resolved_view(get_server_args()))

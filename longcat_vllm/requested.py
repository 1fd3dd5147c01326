"""What a user requests of longcat-serving itself, in vLLM's option for what vLLM does not know."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING

from longcat_core.plugin.requested import Requested

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OPTIONS = {
    "draft_gate": """--additional-config '{"longcat": {"draft_gate": true}}'""",
    "kernels": """--additional-config '{"longcat": {"kernels": true}}'""",
    "flashinfer_mla": """--additional-config '{"longcat": {"flashinfer_mla": true}}'""",
    "overlap": """--additional-config '{"longcat": {"overlap": true}}'""",
    "ffn_experts": """--additional-config '{"longcat": {"ffn_experts": NUMBER}}'""",
    "full_queue": """--additional-config '{"longcat": {"full_queue": NUMBER}}'""",
    "init_expert_location": """--additional-config '{"longcat": {"init_expert_location": "FILE"}}'""",
    "eplb": """--additional-config '{"longcat": {"eplb": {}}}'""",
}
"""As typed, by field of `Requested`."""


def of(vllm_config: VllmConfig) -> Requested:
    """
    Raises:
        ValueError: for another name or value.
    """
    given = vllm_config.additional_config
    ours = given.get("longcat", {}) if isinstance(given, dict) else {}
    return Requested.read(ours, OPTIONS, "longcat.", "--additional-config")


def current() -> Requested:
    """Of the model that is built now; nothing, if none is."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    return Requested() if vllm_config is None else of(vllm_config)

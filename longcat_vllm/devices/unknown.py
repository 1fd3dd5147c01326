"""A device that this package does not know, as AMD's GPUs or another plugin's: vLLM's own class serves there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING

from longcat_core.config import LongcatConfig
from longcat_core.plugin.diagnosis import Finding
from longcat_vllm.devices.cuda.device import Cuda

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Unknown(Cuda):
    def __init__(self, platform: str) -> None:
        self.platform = platform

    def reasons_for_own_class(self, vllm_config: VllmConfig) -> list[str]:
        return [f"longcat-serving does not know the platform {self.platform!r}"]

    def implementations(self, config: LongcatConfig | None) -> list[Finding]:
        return [Finding("model", f"vLLM's own class, as longcat-serving does not know the platform {self.platform!r}")]

"""A device that this package does not know, as AMD's GPUs or an NPU: SGLang's own class serves there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.diagnosis import Finding
from longcat_sglang.devices.cuda.device import Cuda


class Unknown(Cuda):
    def __init__(self, name: str) -> None:
        self.name = name

    def reasons_for_own_class(self) -> list[str]:
        return [f"longcat-serving does not know the device {self.name!r}"]

    def implementations(self) -> list[Finding]:
        return [Finding("model", f"SGLang's own class, as longcat-serving does not know the device {self.name!r}")]

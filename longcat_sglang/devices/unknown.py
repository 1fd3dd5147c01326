"""A device that this package does not know, as an NPU or a TPU: SGLang's own class serves there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_sglang.devices.cuda.device import Cuda


class Unknown(Cuda):
    def __init__(self, name: str) -> None:
        self.name = name

    def reasons_for_own_class(self) -> list[str]:
        return [f"longcat-serving does not know the device {self.name!r}"]

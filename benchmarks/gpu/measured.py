"""A measurement's file, read: rows by stage, the MoE layer by setting, and the floor under each of its times."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longcat_core.planning.hardware import gpu

Row = dict[str, Any]


@dataclass(frozen=True)
class Rates:
    """What the floor is made of: measured by the stage `device`, or else of the data sheet."""

    bytes_per_second: float
    operations_per_second: dict[str, float]


@dataclass(frozen=True)
class MoeSetting:
    """The times of one precision, deployment, number of local experts, and routing."""

    precision: str
    deployment: str
    local_experts: int
    routing: str
    rows: tuple[Row, ...]
    rates: Rates | None

    @property
    def name(self) -> str:
        where = {"tensor": "every rank sees the batch", "data": "T tokens a rank"}[self.deployment]
        return f"{self.precision}, {self.local_experts} local experts, {where}, {self.routing} routing"

    @property
    def tokens(self) -> list[int]:
        return sorted({row["case"]["tokens"] for row in self.rows})

    @property
    def kernels(self) -> list[str]:
        return list(dict.fromkeys(row["case"]["kernel"] for row in self.rows))

    def row(self, kernel: str, tokens: int) -> Row | None:
        wanted = (kernel, tokens)
        return next((row for row in self.rows if (row["case"]["kernel"], row["case"]["tokens"]) == wanted), None)

    def us(self, kernel: str, tokens: int) -> float | None:
        """The median, or None if it was not measured."""
        row = self.row(kernel, tokens)
        us: float | None = None if row is None or "result" not in row else row["result"]["us"]
        return us

    def floor_us(self, tokens: int) -> float | None:
        """Reading the weights that are needed, or multiplying the rows that there are, whichever is longer."""
        row = self.row("ours", tokens)
        if row is None or "result" not in row or self.rates is None:
            return None
        moved = row["result"]["bytes"] / self.rates.bytes_per_second
        multiplied = row["result"]["operations"] / self.rates.operations_per_second[self.precision]
        return 1e6 * max(moved, multiplied)


class Measured:
    """The file of `benchmarks.gpu.measure`."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record

    def rows(self, stage: str) -> list[Row]:
        found: list[Row] = self.record["stages"].get(stage, {}).get("rows", [])
        return found

    def result(self, stage: str, **case: object) -> dict[str, Any] | None:
        """Of the first row whose case has these fields."""
        for row in self.rows(stage):
            if case.items() <= row["case"].items() and "result" in row:
                found: dict[str, Any] = row["result"]
                return found
        return None

    @property
    def identity(self) -> dict[str, Any]:
        return self.result("device", what="identity") or {}

    @property
    def rates(self) -> Rates | None:
        """Of this device; None if it was not measured, and its data sheet is not in planning/data/machines."""
        memory: float | None = None
        products: dict[str, float | None] = {"16 bit": None, "fp8": None}
        try:
            sheet = gpu(str(self.record["device"]))
            memory = sheet.bytes_per_second
            products |= sheet.operations_per_second
        except ValueError:
            pass  # what was measured may be enough
        if copy := self.result("device", what="copy"):
            memory = copy["bytes_per_second"]
        for precision in products:
            if product := self.result("device", what="product", precision=precision):
                products[precision] = product["operations_per_second"]
        known = {precision: rate for precision, rate in products.items() if rate is not None}
        return None if memory is None or len(known) < len(products) else Rates(memory, known)

    def moe_settings(self) -> list[MoeSetting]:
        """In the order in which they were measured."""
        by_setting: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows("moe"):
            fields = tuple(row["case"][name] for name in ("precision", "deployment", "local_experts", "routing"))
            by_setting.setdefault(fields, []).append(row)
        return [MoeSetting(*fields, tuple(rows), self.rates) for fields, rows in by_setting.items()]

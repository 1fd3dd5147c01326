"""What the kernels should reach on a GPU, and whether a measurement shows it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.measured import Measured, MoeSetting

DECODE_TOKENS = 96
"""The most that the goals call a decode shape."""
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: str
    found: str
    """The worst figure, and where it is."""
    verdict: str
    """"met", "missed" or "not measured"."""


def goals(measured: Measured) -> list[Goal]:
    """Those of the MoE layer, over all settings with random routing, and the router's. An interpreter has none."""
    if measured.record["is_tiny"]:
        return []
    settings = [setting for setting in measured.moe_settings() if setting.routing == "random"]

    def over(kernel: str) -> Callable[[MoeSetting, int], float | None]:
        return lambda setting, tokens: _over(setting.us(kernel, tokens), setting.us("ours", tokens))

    def of_floor(setting: MoeSetting, tokens: int) -> float | None:
        return _over(setting.floor_us(tokens), setting.us("ours", tokens))

    return [
        _least(settings, "vLLM's time with all slots computed, over ours, from 512 tokens", 1.4, over("vLLM, remapped"),
               lambda tokens: tokens >= PREFILL_TOKENS),
        _least(settings, "the same, up to 96 tokens", 1.15, over("vLLM, remapped"),
               lambda tokens: tokens <= DECODE_TOKENS),
        _least(settings, "vLLM's time with slots dropped, over ours", 1.0, over("vLLM, dropped"), lambda tokens: True),
        _least(settings, "the floor's time, over ours, up to 96 tokens", 0.8, of_floor,
               lambda tokens: tokens <= DECODE_TOKENS),
        _route(measured),
    ]  # fmt: skip


def _least(
    settings: list[MoeSetting],
    what: str,
    wanted: float,
    figure: Callable[[MoeSetting, int], float | None],
    is_meant: Callable[[int], bool],
) -> Goal:
    figures = [
        (found, f"{setting.name}, {tokens} tokens")
        for setting in settings
        for tokens in setting.tokens
        if is_meant(tokens) and (found := figure(setting, tokens)) is not None
    ]
    if not figures:
        return Goal(what, f"at least {wanted}", "", "not measured")
    worst, where = min(figures)
    met = sum(found >= wanted for found, _ in figures)
    worst_of_all = f"{worst:.2f} ({where}); {met} of {len(figures)} shapes reach it"
    return Goal(what, f"at least {wanted}", worst_of_all, "met" if worst >= wanted else "missed")


def _route(measured: Measured) -> Goal:
    times = []
    for row in measured.rows("pieces"):
        case = row["case"]
        is_meant = (case["piece"], case["kernel"]) == ("route", "ours") and case["tokens"] <= DECODE_TOKENS
        if is_meant and "result" in row:
            times.append((row["result"]["us"], case["tokens"]))
    what, wanted = "route, up to 96 tokens", "at most 6 us"
    if not times:
        return Goal(what, wanted, "", "not measured")
    us, tokens = max(times)
    return Goal(what, wanted, f"{us:.1f} us ({tokens} tokens)", "met" if us <= 6 else "missed")


def _over(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under

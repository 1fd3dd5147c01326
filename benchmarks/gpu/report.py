"""A measurement's file as tables in Markdown and as pictures.

    python -m benchmarks.gpu.report h100.json

writes h100.md and h100.png beside the file. What was wrong, failed or was not measured is in the tables as such.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import Goal, goals
from benchmarks.gpu.measured import Measured, Row
from benchmarks.gpu.plots import draw
from benchmarks.gpu.tuned import best_tiles, fragment

THEORY = {"attention": 264, "MoE": 60}
"""Microseconds a layer of LongCat at EP 128, batch 96 (LongCat-Flash report, Table 7). Its dispatch, 236, and combine,
472, are of the links between ranks. Its time of a layer is the sum, 1032: the second attention and the dense FFNs are
beside the links."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    file: Path = parser.parse_args(arguments).file
    measured = Measured(json.loads(file.read_text()))
    picture = file.with_suffix(".png")
    has_picture = draw(measured, picture)
    page = file.with_suffix(".md")
    page.write_text(text(measured, picture.name if has_picture else None))
    print(page)


def text(measured: Measured, picture: str | None = None) -> str:
    """The whole page."""
    parts = [heading(measured), _goals(goals(measured)), stages(measured)]
    parts += [section(measured) for section in SECTIONS]
    if picture is not None:
        parts.insert(2, f"![The MoE layer]({picture})")
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(measured: Measured) -> str:
    record, identity = measured.record, measured.identity
    versions = ", ".join(f"{name} {version}" for name, version in identity.get("versions", {}).items())
    system = ", ".join(f"{name} {value}" for name, value in identity.get("system", {}).items())
    lines = [
        f"# {record['device']}",
        f"{record['date']}, commit {record['commit']}, kernels {record['kernels']}. {versions}. {system}",
        "Times are microseconds: the median, from CUDA graphs, with L2 cold. Each result was compared with the "
        "reference before it was timed.",
    ]
    if record["is_tiny"]:
        lines.append("**Tiny sizes in Triton's interpreter: the times mean nothing.**")
    return "\n\n".join(lines)


def stages(measured: Measured) -> str:
    rows = []
    for name, of_stage in measured.record["stages"].items():
        counts = [sum(what in row for row in of_stage["rows"]) for what in ("result", "wrong", "error", "missing")]
        rows.append([name, of_stage["state"], f"{of_stage['seconds']:.0f}", *counts, of_stage.get("error", "")[:200]])
    header = ["stage", "state", "seconds", "measured", "wrong", "failed", "missing here", "error"]
    faults = [
        f"- {name}, {_named(row['case'])}: {_last_line(row.get('wrong') or row['error'])}"
        for name, of_stage in measured.record["stages"].items()
        for row in of_stage["rows"]
        if "wrong" in row or "error" in row
    ]
    return "\n\n".join(["## Stages", table(header, rows), *(["Wrong or failed:", "\n".join(faults)] if faults else [])])


def device(measured: Measured) -> str:
    rows = []
    for row in measured.rows("device"):
        result = row.get("result", {})
        rate = result.get("bytes_per_second", 0) / 1e12 or result.get("operations_per_second", 0) / 1e12
        unit = "TB/s" if "bytes_per_second" in result else "TFLOPS" if rate else ""
        if row["case"]["what"] != "identity":
            rows.append([_named(row["case"]), _us(row), f"{rate:.2f} {unit}" if unit else ""])
    return section("Device", ["what", "us", "rate"], rows)


def parity(measured: Measured) -> str:
    lines = []
    for stage in ("parity", "engine parity"):
        rows = [row for row in measured.rows(stage) if "result" in row]
        outcomes = [row["result"]["outcome"] for row in rows]
        if rows:
            counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
            lines.append(f"- {stage}: {counts}")
        lines += [
            f"  - {row['case']['test']}: {_last_line(row['result'].get('message', ''))}"
            for row in rows
            if row["result"]["outcome"] == "failed"
        ]
    return "## Tests\n\n" + "\n".join(lines) if lines else ""


def pieces(measured: Measured) -> str:
    """Kernels down, tokens across."""
    return section("Small kernels", *_by_tokens(measured.rows("pieces"), ("piece", "kernel")))


def moe(measured: Measured) -> str:
    parts = []
    for setting in measured.moe_settings():
        header = ["tokens", *setting.kernels, "remapped / ours", "dropped / ours", "floor", "ours of it"]
        rows = []
        for tokens in setting.tokens:
            ours, floor = setting.us("ours", tokens), setting.floor_us(tokens)
            rows.append(
                [
                    tokens,
                    *(_us(setting.row(kernel, tokens)) for kernel in setting.kernels),
                    _ratio(setting.us("vLLM, remapped", tokens), ours),
                    _ratio(setting.us("vLLM, dropped", tokens), ours),
                    "" if floor is None else f"{floor:.1f}",
                    _share(floor, ours),
                ]
            )
        parts.append(section(f"MoE layer: {setting.name}", header, rows))
    return "\n\n".join(parts)


def tiles(measured: Measured) -> str:
    best = best_tiles(measured)
    if not best:
        return ""
    header = ["precision", "slots an expert", "rows", "columns", "depth", "warps", "stages", "swapped", "us", "default"]
    rows = [
        [found.precision, found.slots, *found.tile.values(), f"{found.us:.1f}", _number(found.default_us)]
        for found in best
    ]
    code = f"```python\n{fragment(measured.record['device'], best)}```"
    note = "For `longcat_core/kernels/tiles.py`:"
    return "\n\n".join([section("Best tiles", header, rows), note, code])


def layer(measured: Measured) -> str:
    rows = [
        [*row["case"].values(), _us(row), row.get("result", {}).get("attention", "")] for row in measured.rows("layer")
    ]
    header = ["tokens", "ranks", "MoE", "streams", "us", "attention"]
    return section("A layer as a graph, one rank's part, without communication", header, rows)


def rank(measured: Measured) -> str:
    rows = []
    for row in measured.rows("rank"):
        theory = THEORY.get(row["case"]["part"])
        of_theory = _ratio(row.get("result", {}).get("us"), theory)
        rows.append([row["case"]["part"], row["case"]["kernel"], _us(row), theory or "", of_theory])
    found = measured.rows("rank")
    title = "One rank"
    if found:
        case = found[0]["case"]
        title = f"One rank of EP {case['ranks']}, batch {case['batch']} with one draft, context {case['context']}"
    return section(title, ["part", "kernel", "us", "report's theory, us", "ours / theory"], rows)


def served(measured: Measured) -> str:
    rows = []
    for row in measured.rows("vllm"):
        result = row.get("result", {})
        decode = result.get("decode_tokens_per_second", {})
        figures = ", ".join(f"{rate} at {batch}" for batch, rate in decode.items())
        why = "" if result else _last_line(row.get("missing") or row.get("error", ""))[:200]
        rows.append([row["case"]["model"], figures or why, result.get("prefill_tokens_per_second", "")])
    return section("vLLM end to end, random weights", ["model", "decode, tokens/s", "prefill, tokens/s"], rows)


def section(title: str, header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    return f"## {title}\n\n{table(header, rows)}" if rows else ""


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _goals(found: list[Goal]) -> str:
    rows = [[goal.what, goal.wanted, goal.found, goal.verdict] for goal in found]
    return section("Goals", ["goal", "wanted", "found", ""], rows)


def _by_tokens(rows: Sequence[Row], down: tuple[str, ...]) -> tuple[list[object], list[list[object]]]:
    tokens = sorted({row["case"]["tokens"] for row in rows})
    names = list(dict.fromkeys(tuple(row["case"][field] for field in down) for row in rows))
    cells = {(*(row["case"][field] for field in down), row["case"]["tokens"]): _us(row) for row in rows}
    return [*down, *tokens], [[*name, *(cells.get((*name, n), "") for n in tokens)] for name in names]


def _us(row: Row | None) -> str:
    """The median, with its quartiles where they are more than 5 % of it apart."""
    if row is None:
        return ""
    if "result" not in row:
        return next(what for what in ("wrong", "missing", "error") if what in row)
    result = row["result"]
    spread = result["us_high"] - result["us_low"]
    around = f" ({result['us_low']:.1f} to {result['us_high']:.1f})" if spread > 0.05 * result["us"] else ""
    return f"{result['us']:.1f}{around}"


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def _ratio(over: float | None, under: float | None) -> str:
    return "" if over is None or under is None or not under else f"{over / under:.2f}"


def _share(part: float | None, whole: float | None) -> str:
    return "" if part is None or not whole else f"{part / whole:.0%}"


def _named(case: dict[str, Any]) -> str:
    return ", ".join(str(value) for value in case.values())


def _last_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


SECTIONS: tuple[Callable[[Measured], str], ...] = (device, parity, moe, pieces, tiles, layer, rank, served)

if __name__ == "__main__":
    main()

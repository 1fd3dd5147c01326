"""Writes what plan.md shows of `longcat plan`, examples and tables: `python -m docs.plan_examples`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.predicted import CLAIMED, Compared, compared
from longcat_cli.commands import app
from longcat_core.planning.drafts import Drafts
from longcat_core.planning.hardware import gpu
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.memory import memory
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment
from longcat_core.planning.rates import rates

PAGE = Path(__file__).with_name("plan.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_EXAMPLE = re.compile(r"^```\n\$ (?P<command>longcat plan [^\n]*)\n(?P<output>.*?)^```$", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)


def written(page: str) -> str:
    """The page with what its commands print, and with its tables, as they are now."""
    page = _EXAMPLE.sub(lambda found: f"```\n$ {found['command']}\n{output(found['command'])}```", page)
    return _TABLE.sub(lambda found: f"<!-- {found['name']} -->\n\n{TABLES[found['name']]()}\n<!-- end -->", page)


def output(command: str) -> str:
    """What `longcat plan OPTIONS` prints, or of it what `| grep -E 'EXPRESSION'` or `| head -LINES` leaves."""
    ours, _, filtering = command.partition(" | ")
    lines = CliRunner().invoke(app, shlex.split(ours)[1:]).output.splitlines()
    match shlex.split(filtering):
        case []:
            pass
        case ["grep", "-E", expression]:
            lines = [line for line in lines if re.search(expression, line)]
        case ["head", count]:
            lines = lines[: int(count.removeprefix("-"))]
        case _:
            raise ValueError(f"{command}: wanted grep -E or head behind a bar")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _table(headings: str, rows: Iterator[tuple[str, ...]]) -> str:
    columns = headings.count("|") + 1
    lines = [f"| {headings} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def who_fits() -> str:
    """0.90 of the memory, 4 GB kept back, the MTP layer loaded, cache in bf16."""
    rows = (
        ("chat", "H100", Layout(8, 1, 8), "fp8"),
        ("chat", "H100", Layout(8, 1, 8), "fp8-all"),
        ("chat", "H20", Layout(8, 1, 8), "fp8"),
        ("chat", "H20-141", Layout(8, 1, 8), "fp8"),
        ("chat", "H200", Layout(8, 1, 8), "fp8"),
        ("chat", "H200", Layout(1, 8, 8), "fp8"),
        ("chat", "B200", Layout(1, 8, 8), "fp8"),
        ("chat", "H200", Layout(8, 1, 8), "bf16"),
        ("chat", "B200", Layout(8, 1, 8), "bf16"),
        ("chat", "H800", Layout(16, 1, 16), "bf16"),
        ("chat", "H800", Layout(8, 2, 16), "bf16"),
        ("chat", "H800", Layout(8, 2, 16), "fp8"),
        ("chat", "H800", Layout(1, 16, 16), "fp8"),
        ("chat", "H800", Layout(1, 16, 16), "fp8-all"),
        ("chat", "GB200", Layout(4, 4, 16), "bf16"),
        ("lite", "H200", Layout(), "bf16"),
        ("lite", "H200", Layout(), "fp8-all"),
    )

    def cells() -> Iterator[tuple[str, ...]]:
        for name, machine, layout, weights in rows:
            known = model(name)
            found = memory(known, layout, precision(weights), gpu(machine).memory_bytes, with_mtp=True)
            room = found.room_bytes / 1e9
            yield (
                f"{known.name}, {weights}",
                f"{layout.gpus} x {machine}{', unverified' * gpu(machine).figures['memory_mib'].is_unverified}",
                str(layout),
                f"{found.weights.total / 1e9:.1f}",
                f"{room:.1f}" if room > 0 else f"*no*: {-room:.1f} are missing",
                f"{found.tokens_a_replica // 1000:,} k" if room > 0 else "",
            )

    return _table(
        "model, `--precision` | machine | layout | weights of a GPU, GB | room for the cache, GB | tokens a replica",
        cells(),
    )


def what_drafts_bring() -> str:
    def cells() -> Iterator[tuple[str, ...]]:
        for requests in (1, 8, 32, 96):
            found = []
            for name in ("report", "meituan", "meituan-overlapped"):
                none, one = (_ep128(name, drafts).at(requests) for drafts in (Drafts(), Drafts(1, 0.8)))
                found.append(one.tokens_per_second_a_user / none.tokens_per_second_a_user)
            yield str(requests), *(f"{each:.2f}" for each in found)

    return _table("requests a GPU | the report's theory | set B | set A", cells())


def more_ranks() -> str:
    def cells() -> Iterator[tuple[str, ...]]:
        for ranks in (16, 32, 64, 128, 320):
            deployment = replace(_ep128("report", Drafts(1, 0.8)), layout=Layout(1, ranks, ranks))
            whole = replace(deployment, rates=rates(gpu("H800"), "peaks"))
            times = [each.at(n).seconds_a_token * 1e3 for each in (deployment, whole) for n in (96, 8)]
            yield str(ranks), *(f"{each:.2f}" for each in times), f"{deployment.memory.weights.total / 1e9:.1f}"

    return _table(
        "ranks | theory, 96 requests | theory, 8 requests | all counted, 96 | all counted, 8 | weights of a GPU, GB",
        cells(),
    )


def _ep128(name: str, drafts: Drafts) -> Deployment:
    return Deployment(
        model("chat"),
        "128 x H800",
        rates(gpu("H800"), name),
        Layout(1, 128, 128),
        precision("fp8-ffns"),
        context=5120 if name == "report" else 5000,
        overlap="single-batch",
        drafts=drafts,
    )


def decode_steps_on_a_cpu() -> str:
    def shown(found: Compared) -> tuple[str, str, str]:
        error = f"{found.error * 100:+.0f} %"
        error = error if abs(found.error) <= CLAIMED else f"**{error}**"
        return f"{found.measured * 1e3:.1f}", f"{found.predicted * 1e3:.1f}", error

    def cells() -> Iterator[tuple[str, ...]]:
        for engine, directory in (("vLLM", "vllm"), ("SGLang", "sglang")):
            first, again = (
                compared(json.loads((RESULTS / directory / file).read_text()))
                for file in ("plan.json", "plan_again.json")
            )
            for one, other in zip(first, again, strict=True):
                yield engine, one.model, str(one.requests), *shown(one), *shown(other)

    run = "measured, ms | predicted, ms | predicted over measured"
    return _table(f"engine | model | requests | {run} | again: {run}", cells())


def calibrations() -> str:
    def cells() -> Iterator[tuple[str, ...]]:
        for engine, directory in (("vLLM", "vllm"), ("SGLang", "sglang")):
            settings = json.loads((RESULTS / directory / "plan.json").read_text())["settings"]
            for name, when in (("Nano", "before"), ("Nano", "after"), ("123M", "after"), ("622M", "after")):
                known = settings[name][when]
                products = ", ".join(f"{known[f'product_bf16_{rows}_rows_gflops']:.0f}" for rows in (1, 8, 64))
                cached = ", ".join(f"{known[f'cached_product_bf16_{rows}_rows_gflops']:.0f}" for rows in (1, 8, 64))
                attention = ", ".join(f"{known[f'attention_{tokens}_tokens_gflops']:.0f}" for tokens in (128, 1024))
                yield (
                    f"{engine}, {when} {name}",
                    f"{known['memory_gb_per_s']:.1f}",
                    products,
                    cached,
                    attention,
                    f"{known['operator_overhead_us']:.2f}",
                )

    return _table(
        "calibrated | memory, GB/s | products, GFLOPS at 1, 8, 64 rows | from the cache | attention at 128, 1,024 "
        "tokens | an operator, us",
        cells(),
    )


def fixed_costs() -> str:
    def cells() -> Iterator[tuple[str, ...]]:
        for file, run in (("plan.json", ""), ("plan_again.json", ", again")):
            for engine, directory in (("vLLM", "vllm"), ("SGLang", "sglang")):
                known = json.loads((RESULTS / directory / file).read_text())["settings"]["fixed"]
                pairs = (
                    (f"{known[name]:,.0f}", f"{known[f'cold_{name}']:,.0f}")
                    for name in ("step_us", "layer_us", "many_rows_layer_us")
                )
                others = (f"{known[name]:.1f}" for name in ("request_us", "layer_request_us"))
                yield f"{engine}{run}", *(", ".join(pair) for pair in pairs), *others

    return _table(
        "us, cache kept, emptied | a step | a layer | a layer, over 32 tokens | a request | a request in a layer",
        cells(),
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "who_fits": who_fits,
    "what_drafts_bring": what_drafts_bring,
    "more_ranks": more_ranks,
    "decode_steps_on_a_cpu": decode_steps_on_a_cpu,
    "calibrations": calibrations,
    "fixed_costs": fixed_costs,
}

if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(PAGE)

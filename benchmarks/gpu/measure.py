"""Everything that is to be known of a GPU, within some minutes: parity, kernels, layers, one rank, vLLM end to end.

    python -m benchmarks.gpu.measure --minutes 9 --out h100.json
    python -m benchmarks.gpu.report h100.json

Stages run in order of value, each in a process of its own with a limit of time. What is measured is in the file at
once; a stage that fails or is cut off leaves its rows, and the next one starts. Called again with the same file, it
goes on where it ended. It needs torch, Triton and this repository; what needs vLLM says so where there is none.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOADED = ["benchmarks.gpu.worker"]
"""Imported once, by the process that the stages' processes are forked from: it never touches the device."""
_LEAST_SECONDS = 5.0
"""A stage is not started with less."""


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    """At most, of one run."""
    what: str


STAGES = (
    Stage("device", 40, "what it is, and what memory, tensor cores and a launch reach"),
    Stage("parity", 110, "tests/kernels on the device"),
    Stage("pieces", 60, "route, arrange, combine and others against the engine's chains"),
    Stage("moe", 180, "the MoE layer at each number of tokens against vLLM's, dropped and remapped"),
    Stage("tiles", 110, "the best tile of the experts by rows an expert"),
    Stage("layer", 50, "a LongCat layer as a CUDA graph"),
    Stage("rank", 50, "one rank of EP 128 at batch 96 with one draft"),
    Stage("vllm", 180, "vLLM end to end: its own class against the plugin"),
    Stage("engine parity", 120, "tests/engines/test_cuda.py"),
)
"""In order of value."""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    record = opened(options.out, options.tiny)
    for name in options.again:
        record["stages"].pop(name, None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    for stage in STAGES:
        if options.only and stage.name not in options.only:
            continue
        of_stage = record["stages"].setdefault(stage.name, {"state": "not started", "seconds": 0.0, "rows": []})
        found = of_stage["rows"]
        of_stage["rows"] = [row for row in found if "missing" not in row]  # it may be here now
        if of_stage["state"] == "complete" and len(of_stage["rows"]) == len(found):
            continue
        left = min(options.limit or stage.seconds, deadline - time.monotonic())
        if left >= _LEAST_SECONDS:
            _run(stage.name, time.monotonic() + left, record, options.out, processes)
        write(options.out, record)
        print(_summary(stage.name, of_stage), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="; ".join(f"{stage.name}: {stage.what}, at most {stage.seconds:.0f} s" for stage in STAGES),
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, required=True, help="JSON; goes on with what it has")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run, all stages together")
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="these stages alone")
    parser.add_argument("--again", nargs="+", choices=names, default=[], help="forget what the file has of these")
    parser.add_argument("--limit", type=float, help="seconds of each stage, in place of its own limit")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in Triton's interpreter on a CPU")
    return parser


def opened(path: Path, is_tiny: bool) -> dict[str, Any]:
    """The record to go on with, or a new one.

    Raises:
        SystemExit: if the file is of other kernels or of other sizes.
    """
    now = {"kernels": kernels_digest(), "is_tiny": is_tiny}
    if not path.exists():
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return {"date": date, "commit": commit(), **now, "device": None, "stages": {}}
    record: dict[str, Any] = json.loads(path.read_text())
    for name, value in now.items():
        if record[name] != value:
            sys.exit(f"{path}: {name} {record[name]}, wanted {value}, to go on; give another --out")
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """At once or not at all, as a run may be ended at any time."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def commit() -> str:
    """Of the working tree, with a + if it was changed; "unknown" where there is no git."""
    try:
        found = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+" if found[1] else "")


def kernels_digest() -> str:
    """Of what is measured: a copy of the repository may have no history."""
    files = sorted((ROOT / "longcat_core/kernels").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _run(name: str, end: float, record: dict[str, Any], path: Path, processes: ForkServerContext) -> None:
    """Run a stage until it is complete or its time is up; after an error that lost the device, in a new process."""
    of_stage, started = record["stages"][name], time.monotonic()
    before = of_stage["seconds"]
    of_stage["state"] = "cut off"
    while time.monotonic() < end:
        known = len(of_stage["rows"])
        done = frozenset(json.dumps(row["case"], sort_keys=True) for row in of_stage["rows"])
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=_work, args=(name, record["is_tiny"], done, theirs))
        process.start()
        theirs.close()
        try:
            ending = _receive(ours, end, record, name, path)
        finally:
            _end(process)
            of_stage["seconds"] = round(before + time.monotonic() - started, 1)
        of_stage["state"] = ending
        if ending != "failed" or len(of_stage["rows"]) == known:
            return


def _work(name: str, is_tiny: bool, done: frozenset[str], rows: Connection) -> None:
    from benchmarks.gpu import worker

    try:
        worker.run(name, is_tiny, done, rows)
    except Exception as error:
        rows.send({"failed": f"{type(error).__name__}: {error}"[-3000:]})


def _receive(rows: Connection, end: float, record: dict[str, Any], name: str, path: Path) -> str:
    """Rows into the record, and into the file. Returns how the stage ended."""
    of_stage = record["stages"][name]
    of_stage.pop("error", None)
    try:
        while rows.poll(max(0.0, end - time.monotonic())):
            message = rows.recv()
            if "device" in message:
                if record["device"] not in (None, message["device"]):
                    sys.exit(f"{path}: measured on {record['device']}, this is {message['device']}; give another --out")
                record["device"] = message["device"]
            elif "complete" in message:
                return "complete"
            elif "failed" in message:
                of_stage["error"] = message["failed"]
                return "failed"
            else:
                of_stage["rows"].append(message)
                write(path, record)
    except EOFError:
        of_stage["error"] = "its process died"
        return "failed"
    return "cut off"


def _end(process: Any) -> None:
    """A stage's process, and all that it has started."""
    process.join(timeout=1)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def _summary(name: str, of_stage: dict[str, Any]) -> str:
    rows = of_stage["rows"]
    counts = {what: sum(what in row for row in rows) for what in ("result", "wrong", "error", "missing")}
    figures = ", ".join(f"{count} {what}" for what, count in counts.items())
    error = f": {of_stage['error'].splitlines()[-1][:300]}" if "error" in of_stage else ""
    return f"{name}: {of_stage['state']} after {of_stage['seconds']:.0f} s, {figures}{error}"


if __name__ == "__main__":
    main()

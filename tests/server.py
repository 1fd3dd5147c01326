"""An engine's stock server in processes of its own: started, asked over HTTP, ended."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.harness import engine

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20
ONE_REQUEST_A_CONNECTION = httpx.Limits(max_keepalive_connections=0)
"""uvicorn closes an idle connection after 5 s, and a request sent over it in that moment is lost."""
LOG_TAIL = 120
"""Lines: an engine's processes report a failure one after the other, the one that knows its cause first."""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    http: httpx.Client
    log: Path

    def metric(self, name: str, default: float | None = None) -> float:
        """The sum of a metric over its labels; `name{label="value"}` sums only where the label is so.

        default: for what the server has not counted yet, which some have no line for.

        Raises:
            KeyError: if the server has no such metric, and there is no default.
        """
        base, _, label = name.rstrip("}").partition("{")
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        ours = [line for line in lines if line.startswith((f"{base}{{", f"{base} ")) and label in line]
        values = [float(line.rpartition(" ")[2]) for line in ours]
        if not values:
            if default is None:
                raise KeyError(name)
            return default
        return sum(values)

    def end(self) -> int:
        """SIGTERM to the server, as a service manager sends it; its exit status.

        Raises:
            subprocess.TimeoutExpired: if it has not ended after `STOP_TIMEOUT_S`.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """For what an engine counts or does a step later than it answers."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.02)


@contextmanager
def serving(command: Sequence[str | Path], log: Path) -> Iterator[Server]:
    """A server that answers, and is gone afterwards. It is told to listen on a free port of 127.0.0.1.

    Raises:
        RuntimeError: with the end of the log, if it ends or is not ready in time.
    """
    port = free_port()
    # Proxies of the environment are for other hosts than this one.
    url = f"http://127.0.0.1:{port}"
    http = httpx.Client(base_url=url, timeout=START_TIMEOUT_S, trust_env=False, limits=ONE_REQUEST_A_CONNECTION)
    with started([*command, "--host", "127.0.0.1", "--port", str(port)], log) as process, http:
        server = Server(process, http, log)
        _wait_until_ready(server)
        yield server


@contextmanager
def started(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, all of which is ended with the `with` block, however that ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_of(server: subprocess.Popen[bytes]) -> list[int]:
    """Those of the server's group that run: itself, its engine, its helpers."""
    numbered = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [process for process in numbered if _running_group(process) == server.pid]


def title(process: int) -> str:
    """What it is called, or its command."""
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def free_port() -> int:
    """Of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])


def _environment() -> dict[str, str]:
    """A user's: without what the tests set for engines in their own process."""
    return {key: value for key, value in os.environ.items() if key not in engine.OURS}


def _wait_until_ready(server: Server) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_TIMEOUT_S:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.process.returncode}:\n{tail(server.log)}")
        with suppress(httpx.TransportError):
            if server.http.get("/health").is_success:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S} s:\n{tail(server.log)}")


def _running_group(process: int) -> int | None:
    """The process group of a process; None if it has ended, whether or not its parent has noticed."""
    try:
        state, _, group = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(group)

"""`longcat top`: figures worked by hand, of both engines' `/metrics`; a real terminal; what it refuses."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from longcat_cli.commands import app
from longcat_cli.server_metrics import MetricsError, Samples, metrics_url, read
from longcat_cli.top import bars, view

VLLM = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="nano"} 3
vllm:num_requests_waiting{engine="0",model_name="nano"} 1
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="nano"} 1500
vllm:time_to_first_token_seconds_sum{engine="0",model_name="nano"} 1.5
vllm:time_to_first_token_seconds_count{engine="0",model_name="nano"} 12
"""
SGLANG = """
sglang:num_running_reqs{model_name="nano",tp_rank="0"} 3
sglang:num_queue_reqs{model_name="nano",priority="",tp_rank="0"} 1
sglang:num_queue_reqs{model_name="nano",priority="7",tp_rank="0"} 1
sglang:realtime_tokens_total{mode="decode",model_name="nano",tp_rank="0"} 1500
sglang:realtime_tokens_total{mode="prefill_compute",model_name="nano",tp_rank="0"} 99
sglang:time_to_first_token_seconds_sum{is_streaming="true",model_name="nano"} 0.5
sglang:time_to_first_token_seconds_sum{is_streaming="false",model_name="nano"} 1.0
sglang:time_to_first_token_seconds_count{is_streaming="true",model_name="nano"} 4
sglang:time_to_first_token_seconds_count{is_streaming="false",model_name="nano"} 8
"""
RANKS = """
longcat:busiest_rank_rows_total{layer="0",model_name="nano"} 220
longcat:mean_rank_rows_total{layer="0",model_name="nano"} 200
"""
DRAFTS = {
    VLLM: """
vllm:spec_decode_num_drafts_total{engine="0",model_name="nano"} 200
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="nano",position="0"} 150
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="nano",position="1"} 50
vllm:spec_decode_num_draft_tokens_pruned_total{engine="0",model_name="nano"} 60
""",
    SGLANG: """
longcat:verified_chains_total{model_name="nano"} 200
longcat:accepted_drafts_total{model_name="nano",position="0"} 150
longcat:accepted_drafts_total{model_name="nano",position="1"} 50
sglang:spec_num_drafts_pruned_total{model_name="nano"} 60
""",
}
ENGINES = {"vLLM": VLLM, "SGLang": SGLANG}


def layer(number: int, tokens: Sequence[int], busiest: float, mean: float) -> str:
    """Tokens by their number of FFN experts, none of which is chosen more often than `busiest` says."""
    labels = f'layer="{number}",model_name="nano"'
    choices = sum(experts * count for experts, count in enumerate(tokens))
    zero = (len(tokens) - 1) * sum(tokens) - choices
    bounds = [f"{experts}.0" for experts in range(len(tokens))]
    lines = [
        f'longcat:ffn_experts_per_token_bucket{{{labels},le="{bound}"}} {sum(tokens[: n + 1])}'
        for n, bound in enumerate([*bounds, "+Inf"])
    ]
    lines += [
        f"longcat:ffn_experts_per_token_sum{{{labels}}} {choices}",
        f"longcat:ffn_experts_per_token_count{{{labels}}} {sum(tokens)}",
        f'longcat:expert_choices_total{{{labels},kind="ffn"}} {choices}',
        f'longcat:expert_choices_total{{{labels},kind="zero"}} {zero}',
        f"longcat:busiest_expert_tokens_total{{{labels}}} {busiest}",
        f"longcat:mean_expert_tokens_total{{{labels}}} {mean}",
    ]
    return "\n".join(lines) + "\n"


LAYERS = layer(0, [0, 10, 80, 10], 60, 20) + layer(10, [50, 0, 0, 50], 40, 20) + layer(2, [0, 0, 0, 100], 20, 20)


@dataclass
class Shown:
    """A server, and what it answers."""

    url: str
    text: str
    status: int = 200
    asked: int = 0


@contextmanager
def server(text: str) -> Iterator[Shown]:
    shown = Shown("", text)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.asked += 1
            self.send_response(shown.status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(shown.text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        shown.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield shown
        listening.shutdown()


@pytest.fixture(autouse=True)
def _directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of the environment are for other hosts than this one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def run(url: str) -> Result:
    return CliRunner().invoke(app, ["top", url])


def row(text: str, name: str) -> list[str]:
    """The cells behind the name of a row."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return re.split(r"  +", line.strip().removeprefix(name).strip())


def printed(shown: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_terminal_one_reading_is_printed(engine: str) -> None:
    text = ENGINES[engine]
    with server(text + LAYERS + RANKS + DRAFTS[text]) as shown:
        result = run(shown.url)
        assert shown.asked == 1
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"nano in {engine}; requests: 3 running, 1 waiting\n")
    wanted = {
        "tokens generated": "1,500",
        "seconds to first token, mean": "0.125",
        "FFN experts a token, mean": "2.17",  # 200 + 150 + 300 of 300 tokens
        "expert choices that were free": "27.8%",  # 250 of 900
        "busiest expert over the mean": "2.00",  # 120 of 60
        "busiest rank over the mean": "1.10",
        "drafts accepted, position 0": "75.0%",
        "drafts accepted, position 1": "25.0%",
        "drafts pruned": "60",
    }
    assert {name: row(result.stdout, name)[0] for name in wanted} == wanted


def test_layers_are_shown_in_order_with_their_tokens_by_ffn_experts() -> None:
    with server(VLLM + LAYERS) as shown:
        lines = printed(view(read(f"{shown.url}/metrics"))).splitlines()
    rows = [found.groups() for line in lines if (found := re.search(r" (\d+) +(\S+) +([·▁-█]{4}) +(\S+) *$", line))]
    assert rows == [("0", "2.00", "·▁█▁", "3.00"), ("2", "3.00", "···█", "1.00"), ("10", "1.50", "█··█", "2.00")]


def test_without_ranks_drafts_and_gate_nothing_is_said_of_them() -> None:
    with server(VLLM + LAYERS) as shown:
        said = run(shown.url).stdout
    assert "rank" not in said
    assert "draft" not in said
    assert "dial" not in said


def test_the_target_of_a_dial_is_shown_as_it_is_now() -> None:
    target = '# TYPE longcat:ffn_experts_target gauge\nlongcat:ffn_experts_target{{model_name="nano"}} {}\n'
    with server(VLLM + LAYERS + target.format(3)) as shown:
        before = read(f"{shown.url}/metrics")
        shown.text = VLLM + LAYERS + target.format(2.5)
        now = read(f"{shown.url}/metrics")
    heading = "nano in vLLM; requests: 3 running, 1 waiting; the dial's target: {} FFN experts a token\n"
    assert printed(view(before)).startswith(heading.format(3))
    assert printed(view(now, before)).startswith(heading.format(2.5))


def test_before_the_first_token_there_are_no_figures() -> None:
    with server(SGLANG.replace("1500", "0") + layer(0, [0, 0, 0], 0, 0)) as shown:
        said = run(shown.url).stdout
    assert row(said, "FFN experts a token, mean")[0] == "-"
    assert row(said, "busiest expert over the mean")[0] == "-"


def test_rates_are_those_between_two_readings() -> None:
    with server(VLLM + LAYERS) as shown:
        before = read(f"{shown.url}/metrics")
        shown.text = (
            VLLM.replace("1500", "1600") + layer(0, [0, 10, 80, 110], 90, 25) + layer(2, [0, 0, 0, 100], 20, 20)
        )
        now = read(f"{shown.url}/metrics")
    said = printed(view(now, before))
    seconds = now.seconds - before.seconds
    rate, total = row(said, "tokens generated")[:2]
    assert float(rate.removesuffix("/s").replace(",", "")) == pytest.approx(100 / seconds, abs=0.1)
    assert total == "1,600"
    assert row(said, "FFN experts a token, mean")[:2] == ["3.00", "2.67"]
    assert row(said, "busiest expert over the mean")[:2] == ["6.00", "2.44"]
    assert row(said, "seconds to first token, mean")[:2] == ["-", "0.125"]


def test_a_counter_that_is_less_than_before_began_again() -> None:
    with server(VLLM + LAYERS) as shown:
        before = read(f"{shown.url}/metrics")
        shown.text = VLLM.replace("1500", "7") + layer(0, [0, 2, 2, 0], 2, 1)
        now = read(f"{shown.url}/metrics")
    grown = now.since(before)
    assert grown.sum("vllm:generation_tokens_total") == 7
    assert grown.sum("longcat:ffn_experts_per_token_sum") == 6


def test_a_bar_is_as_high_as_its_share_of_the_highest() -> None:
    assert bars([0, 1, 4, 8, 2]) == "·▁▄█▂"
    assert bars([0, 0]) == "··"
    assert bars([1, 1000]) == "▁█", "what there is of a number is seen"


def test_a_label_that_a_sample_lacks_is_empty() -> None:
    samples = Samples({("a", frozenset({("x", "1")})): 1, ("a", frozenset({("x", "1"), ("y", "2")})): 2})
    assert samples.sum("a", y="") == 1
    assert samples.sum("a", y="2") == 2
    assert samples.sum("a", x="1") == 3


def test_a_terminal_obeys_nothing_in_a_servers_answer() -> None:
    text = (VLLM + LAYERS).replace('"nano"', '"[red]na\x1b]0;evil\x07no"')
    with server(text) as shown:
        said = run(shown.url).stdout
    assert said.startswith("[red]na�]0;evil�no in vLLM")


@pytest.mark.parametrize(
    ("url", "metrics"),
    [
        ("http://localhost:8000", "http://localhost:8000/metrics"),
        ("http://localhost:8000/", "http://localhost:8000/metrics"),
        ("localhost:30000", "http://localhost:30000/metrics"),
        ("https://host/nano/metrics", "https://host/nano/metrics"),
        ("http://[::1]:8000", "http://[::1]:8000/metrics"),
    ],
)
def test_an_address_may_be_given_as_one_has_it(url: str, metrics: str) -> None:
    assert metrics_url(url) == metrics


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "http://", "http://host:port", "ftp://host", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(MetricsError, match="wanted one like http://localhost:8000"):
        metrics_url(url)


def assert_refused(result: Result, complaint: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(f"^longcat top: {complaint}$", result.stderr.strip()), result.stderr


def test_an_address_without_these_metrics_is_told_apart() -> None:
    with server("") as shown:
        assert_refused(run(shown.url), rf"{shown.url}/metrics: no metrics of vLLM or SGLang")
        shown.text = "# HELP up Nothing.\nup 1\n"
        assert_refused(run(shown.url), rf"{shown.url}/metrics: no metrics of vLLM or SGLang")
        shown.text = VLLM
        assert_refused(run(shown.url), rf"{shown.url}/metrics: metrics of vLLM, and none of LongCat's .*")
        shown.text = "<!doctype html>\n<html><body class='a'>Hello, you!</body></html>\n"
        assert_refused(run(shown.url), rf"{shown.url}/metrics: what is there are no metrics")
        shown.status = 404
        assert_refused(run(shown.url), rf"{shown.url}/metrics: status 404; .*--enable-metrics")
        shown.status = 500
        assert_refused(run(shown.url), rf"{shown.url}/metrics: status 500; the server's log says why")
    assert_refused(run(shown.url), rf"{shown.url}/metrics: cannot be reached: .*refused")


def test_a_server_that_speaks_no_http_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-x\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert_refused(run(f"127.0.0.1:{listening.getsockname()[1]}"), ".*: cannot be reached: .*")


def _heed_interrupts() -> None:
    """A shell has what it runs in the background ignore them, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A command in a terminal of its own, 120 columns wide."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=_heed_interrupts
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text, re.DOTALL):
            ready, _, _ = select.select([self._ours], [], [], deadline - time.monotonic())
            assert ready, f"no {pattern!r} in {self.text!r}"
            self.text += os.read(self._ours, 1 << 16).decode()

    def close(self) -> None:
        os.close(self._ours)
        self.process.kill()
        self.process.wait()


def test_in_a_terminal_it_goes_on_until_it_is_interrupted() -> None:
    with server(VLLM + LAYERS) as shown:
        code = "from longcat_cli.commands import app; app()"
        terminal = Terminal(sys.executable, "-c", code, "top", shown.url, "--interval", "1")
        try:
            terminal.wait_for("1,500")
            shown.text = VLLM.replace("1500", "1777") + LAYERS
            terminal.wait_for(r"last \d+ s.*1,777")
            shown.status = 503
            terminal.wait_for("status 503")
            shown.status, shown.text = 200, VLLM.replace("1500", "1888") + LAYERS
            terminal.wait_for("1,888")
            assert "503" not in terminal.text.partition("1,888")[2]
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for(re.escape("\x1b[?25h"))  # the cursor is back
            assert terminal.process.wait(10) == 0
            assert "Traceback" not in terminal.text
        finally:
            terminal.close()

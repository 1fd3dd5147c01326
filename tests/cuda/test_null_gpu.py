"""The null GPU itself, as PyTorch sees it: a limit of memory, what the host has written, launches, graphs, forks."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from longcat_core.null_gpu.build import build, variables
from longcat_core.planning import hardware

SCRIPT = """
import json, os, torch
from longcat_core.null_gpu import launches
found = {}
device = torch.cuda.get_device_properties(0)
found["device"] = [torch.cuda.device_count(), device.name, [device.major, device.minor], device.multi_processor_count]
found["memory"] = torch.cuda.mem_get_info()
found["read back"] = torch.tensor([1, 2, 3], device="cuda").tolist()
before = launches.counted()
a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((7, 64), (64, 5)))
found["shape"] = list((a @ b).relu().shape)
found["launches"] = dict(launches.counted() - before)
big = torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
try:
    torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    found["refused"] = str(error)
del big
torch.cuda.empty_cache()
found["given back"] = torch.cuda.mem_get_info()[0]
try:
    a @ a
except RuntimeError as error:
    found["misshapen"] = str(error)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    c = a + 1
before = launches.counted()
graph.replay()
found["replay"] = dict(launches.counted() - before)
from longcat_core.null_gpu.steps import Executed, counting
class Layer(torch.nn.Linear):
    def forward(self, rows, fork, join):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        if fork:
            side.wait_stream(here)
        with torch.cuda.stream(side):
            branch = rows + 1
            done = side.record_event()
        rows = rows.relu()
        if join:
            here.wait_event(done)
        return rows + branch
model = torch.nn.Module()
model.layers = torch.nn.ModuleList(Layer(4, 4, device="cuda") for _ in range(2))
found["unordered"] = []
for fork, join in ((True, True), (True, False), (False, True)):
    step = Executed(1, 1)
    with counting(step, model):
        for layer in model.layers:
            layer(torch.empty(3, 4, device="cuda"), fork, join)
    found["unordered"].append([step.unordered, [each.total() for each in step.beside]])
if (child := os.fork()) == 0:
    os._exit(0 if torch.ones(3, device="cuda").is_cuda else 1)
found["fork"] = os.waitpid(child, 0)[1]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, **variables(build(), hardware.machine("4xH100"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_it_is_the_gpu_that_is_asked_for(found: dict[str, Any]) -> None:
    gpu = hardware.gpu("H100")
    assert found["device"] == [4, gpu.driver_name, list(gpu.compute_capability), gpu.multiprocessors]
    assert found["memory"] == [gpu.memory_bytes - gpu.context_mib * hardware.MIB, gpu.memory_bytes]


def test_what_the_host_writes_it_reads_back(found: dict[str, Any]) -> None:
    assert found["read back"] == [1, 2, 3]


def test_kernels_are_counted_under_their_names(found: dict[str, Any]) -> None:
    assert found["shape"] == [7, 5]
    assert sum(found["launches"].values()) == 2
    assert any(name.startswith("cublas") for name in found["launches"])


def test_memory_has_the_gpus_limit_and_is_given_back(found: dict[str, Any]) -> None:
    assert "CUDA out of memory. Tried to allocate 60.00 GiB" in found["refused"]
    assert found["given back"] > 70 << 30


def test_shapes_are_checked_as_on_a_gpu(found: dict[str, Any]) -> None:
    assert "mat1 and mat2 shapes cannot be multiplied (7x64 and 7x64)" in found["misshapen"]


def test_a_graph_is_captured_and_its_replay_launches_nothing_by_itself(found: dict[str, Any]) -> None:
    assert found["replay"] == {}


def test_a_second_stream_that_does_not_wait_or_is_not_waited_for_is_seen(found: dict[str, Any]) -> None:
    in_order, join_left_out, fork_left_out = found["unordered"]
    assert in_order == [[0, 0], [1, 1]]
    assert join_left_out == fork_left_out == [[1, 1], [1, 1]]


def test_a_fork_has_the_gpu_too(found: dict[str, Any]) -> None:
    assert found["fork"] == 0

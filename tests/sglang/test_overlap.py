"""A layer's MoE beside its dense path: the order of the layer's operations, and what they may read when."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from longcat_core.layers.experts import Shortcut
from longcat_core.layers.routing import Routing
from longcat_sglang import deployment, ffn, model, moe
from longcat_sglang.devices.branch import Begun, Branch, InARow
from longcat_sglang.devices.cpu.device import Cpu
from longcat_sglang.devices.cuda import overlap
from longcat_sglang.devices.cuda.device import Cuda
from longcat_sglang.devices.cuda.overlap import SecondStream
from tests.cases import DEFAULT, Case
from tests.engines.test_scheduling import CASE, assert_true
from tests.overlap import DENSE, FORK, JOIN, MAIN, SIDE, Recorder, problems
from tests.sglang.engine import serving
from tests.sglang.test_options import MODEL_CONFIG, settings

X = torch.ones(3, 4)


def a_layer(recorder: Recorder, branch: Branch, patch: pytest.MonkeyPatch) -> Any:
    """`LongcatDecoderLayer` with the real order of calls, whose parts note that they are called."""

    def attend(number: int, hidden_states: Tensor) -> Tensor:
        for part in ("qkv", "core", "output"):
            recorder.note(f"attention_{number}_{part}")
        return hidden_states

    def stage(summed: str = "") -> Any:
        @contextmanager
        def leaving(_: Any) -> Iterator[Any]:
            yield SimpleNamespace(finish=lambda rows: rows)

        return SimpleNamespace(
            prepare=lambda rows, _: recorder.note(summed, rows) if summed else rows,
            finish=lambda rows, _: rows,
            exit=leaving,
            branch_input=lambda source, rows, _: rows,
            branch_output=lambda rows, _: rows,
        )

    parallel = SimpleNamespace(tp_size=2)
    patch.setattr(ffn, "get_parallel", lambda: parallel)
    patch.setattr(ffn, "should_skip_mlp_all_reduce", lambda: False)
    patch.setattr(ffn, "tensor_model_parallel_all_reduce", recorder.sum)
    patch.setattr(ffn.LongcatFFN, "partial", lambda self, rows: recorder.note(self.name, rows))
    patch.setattr(moe, "identity_share", lambda rows, _: recorder.note("identity", rows))
    patch.setattr(moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: True))
    patch.setattr(moe.LongcatMoE, "note", lambda *_: None)
    patch.setattr(moe.placement, "place_ids", lambda ids, _: ids)
    patch.setattr(model.residual_batch, "current", lambda _: SimpleNamespace(residual=X))
    patch.setattr(torch.cuda, "current_stream", lambda: recorder.stream(MAIN))
    patch.setattr(torch.cuda, "stream", recorder.in_stream)
    patch.setattr(overlap, "is_captured_whole", lambda: True)

    def bare(cls: type[nn.Module], **attributes: Any) -> Any:
        module = object.__new__(cls)
        nn.Module.__init__(module)
        vars(module).update(attributes)
        return module

    def router(rows: Tensor) -> Tensor:
        return cast(Tensor, recorder.note("router", rows))

    router.bias = None  # type: ignore[attr-defined]
    routing = Routing(torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2), torch.ones(3))
    experts = bare(
        moe.LongcatMoE,
        config=DEFAULT,
        layer_id=0,
        router=router,
        route=lambda *_, **__: routing,
        experts=lambda rows, _: recorder.note("experts", rows),
        branch=branch,
    )
    return bare(
        model.LongcatDecoderLayer,
        self_attn=[partial(attend, 0), partial(attend, 1)],
        mlp=experts,
        mlps=[bare(ffn.LongcatFFN, name=f"dense_ffn_{number}") for number in range(2)],
        _attention=stage(),
        _moe=stage("attention_0_sum"),
        _first_ffn=stage(),
        _second_attention=stage(),
        _second_ffn=stage("attention_1_sum"),
    )


def order(layer: Any, recorder: Recorder) -> list[tuple[str, str]]:
    batch: Any = None
    layer(X, batch, {})
    return recorder.noted


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_the_moe_runs_beside_the_dense_path_and_sums_are_made_on_one_stream(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = order(a_layer(recorder, SecondStream(recorder.stream(SIDE)), monkeypatch), recorder)
    assert problems(noted) == []
    names = [name for _, name in noted]
    beside = noted[names.index(FORK) + 1 : names.index(JOIN)]
    assert [name for stream, name in beside if stream == SIDE] == ["router", "experts", "identity"]
    assert [name for stream, name in beside if stream == MAIN] == DENSE
    assert noted[-1] == (MAIN, "final_sum")


@pytest.mark.parametrize("is_captured", [True, False])
def test_without_a_second_stream_the_moe_comes_first(
    is_captured: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = InARow() if is_captured else SecondStream(recorder.stream(SIDE))
    layer = a_layer(recorder, branch, monkeypatch)
    monkeypatch.setattr(overlap, "is_captured_whole", lambda: is_captured)
    noted = order(layer, recorder)
    assert problems(noted) == []
    assert {stream for stream, _ in noted} == {MAIN}
    names = [name for _, name in noted]
    assert not {FORK, JOIN} & set(names)
    assert names.index("identity") < names.index("dense_ffn_0")


@pytest.mark.parametrize("is_captured", [True, False])
def test_what_the_second_stream_reads_stays_in_memory(
    is_captured: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stream would write to it again. In a prompt, outside of graphs, it would be in the way."""
    layer = a_layer(recorder, SecondStream(recorder.stream(SIDE)), monkeypatch)
    monkeypatch.setattr(overlap, "is_captured_whole", lambda: is_captured)
    assert (layer.mlp.begin(X).hidden_states is X) is is_captured


def no_join(recorder: Recorder, layer: Any) -> None:
    layer.mlp.branch.end = lambda begun: begun.shortcut


def no_fork(recorder: Recorder, layer: Any) -> None:
    layer.mlp.branch._stream.wait_stream = lambda other: None


def a_sum_in_the_branch(recorder: Recorder, layer: Any) -> None:
    experts = layer.mlp.experts
    layer.mlp.experts = lambda *given: recorder.sum(experts(*given))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (no_join, "final_sum in 1 reads experts, which is not done"),
        (no_fork, "router in 0 reads attention_0_sum, which is not done"),
        (a_sum_in_the_branch, "experts_sum on the second stream"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_the_order_is_found(
    fault: Callable[[Recorder, Any], None], found: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = a_layer(recorder, SecondStream(recorder.stream(SIDE)), monkeypatch)
    fault(recorder, layer)
    assert any(problem.startswith(found) for problem in problems(order(layer, recorder)))


class AtTheEnd(Branch):
    """The latest that a second stream can be."""

    def begin(self, moe: Callable[[Tensor], Shortcut], hidden_states: Tensor) -> Begun:
        unread: Any = None
        return Begun(unread, moe, hidden_states)

    def end(self, begun: Begun) -> Shortcut:
        return cast(Shortcut, begun.done(begun.hidden_states))


def at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "branch", lambda self: AtTheEnd())


def test_the_moe_may_run_as_late_as_the_layers_end(checkpoint_of: Callable[[Case], Path]) -> None:
    """Nothing reads it before, and the dense path leaves alone what it reads. As early as can be is what a CPU does."""
    with serving(checkpoint_of(CASE), tensor_parallel=2, broken=at_the_end) as served:
        assert_true(served)


@pytest.mark.parametrize(
    ("captured", "breakable", "piecewise", "whole"),
    [
        (True, False, False, True),
        (False, False, False, False),
        (True, True, False, False),
        (True, False, True, False),
    ],
)
def test_only_a_graph_of_a_whole_step_has_a_second_stream(
    captured: bool, breakable: bool, piecewise: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "get_is_capture_mode", lambda: captured)
    monkeypatch.setattr(overlap, "is_in_breakable_cuda_graph", lambda: breakable)
    monkeypatch.setattr(overlap, "is_in_tc_piecewise_cuda_graph", lambda: piecewise)
    assert overlap.is_captured_whole() is whole


@pytest.mark.parametrize(
    ("asked", "transport", "kind"),
    [(True, "none", SecondStream), (False, "none", InARow), (True, "deepep", InARow)],
)
def test_a_gpu_has_a_second_stream_where_it_is_asked_for_and_there_is_no_transport(
    asked: bool, transport: str, kind: type[Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SimpleNamespace(enable_single_batch_overlap=asked, moe_a2a_backend=transport)
    made: list[str] = []
    monkeypatch.setattr("sglang.srt.runtime_context.get_server_args", lambda: None)
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.resolved_view", lambda _: given)
    monkeypatch.setattr("sglang.srt.runtime_context.get_stream", made.append)
    assert type(Cuda().branch()) is kind
    assert made == (["longcat_moe"] if kind is SecondStream else [])
    assert bool(Cuda().obstacles_to_overlap(given)) is (transport == "deepep")
    assert Cpu().obstacles_to_overlap(given) == ["a CPU has no streams"]


@pytest.mark.parametrize(
    ("asked", "transport", "is_said"), [(True, "deepep", True), (True, "none", False), (False, "deepep", False)]
)
def test_the_log_says_why_nothing_runs_beside_the_dense_path(
    asked: bool, transport: str, is_said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = "auto" if transport == "none" else "deep_gemm"
    given = settings("cuda", enable_single_batch_overlap=asked, moe_a2a_backend=transport, moe_runner_backend=runner)
    monkeypatch.setattr(deployment.hooks, "install", lambda _: None)
    monkeypatch.setattr(deployment, "check", lambda *_: None)
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.resolving_view", lambda _: given)
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.model_config_of", lambda _: MODEL_CONFIG)
    with caplog.at_level("WARNING"):
        deployment.settle(given)
    assert ("no layer's MoE runs beside its dense path: --moe-a2a-backend deepep" in caplog.text) is is_said

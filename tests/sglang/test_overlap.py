"""A layer's MoE beside its dense path: the order of the layer's operations, and what they may read when."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sglang.srt.layers.moe.utils import DeepEPMode, initialize_moe_config
from torch import Tensor, nn

from longcat_core.layers.routing import Routing
from longcat_core.parallel.schedule import SHORTCUT_LAYER, SINGLE_BATCH, Resource
from longcat_core.plugin.requested import Requested
from longcat_sglang import deployment, ffn, model, moe, requested
from longcat_sglang.devices.branch import Branch, InARow
from longcat_sglang.devices.cpu.device import Cpu
from longcat_sglang.devices.cuda import overlap
from longcat_sglang.devices.cuda.device import Cuda
from longcat_sglang.devices.cuda.overlap import Exchange, SecondStream
from tests.cases import DEFAULT, Case
from tests.engines.test_scheduling import CASE, assert_true
from tests.overlap import DENSE, FORK, JOIN, MAIN, SIDE, TRANSPORT, Recorder, problems, stages
from tests.sglang import deep_ep
from tests.sglang.engine import serving
from tests.sglang.test_options import MODEL_CONFIG, settings

X = torch.ones(3, 4)


def a_layer(recorder: Recorder, branch: Branch, patch: pytest.MonkeyPatch, transport: DeepEPMode | None = None) -> Any:
    """`LongcatDecoderLayer` with the real order of calls, whose parts note that they are called.

    transport: with SGLang's dispatcher for DeepEP, and a stand-in for what that calls."""
    if transport:
        deep_ep.install(recorder, patch)

    class Attention:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, hidden_states: Tensor) -> Tensor:
            return self.project(hidden_states)()

        def project(self, hidden_states: Tensor) -> Callable[[], Tensor]:
            recorder.note(f"attention_{self.number}_qkv")
            return partial(self.attend, hidden_states)

        def attend(self, hidden_states: Tensor) -> Tensor:
            for part in ("core", "output"):
                recorder.note(f"attention_{self.number}_{part}")
            return hidden_states

    class Experts:
        def __init__(self) -> None:
            self.dispatcher = deep_ep.dispatcher(transport) if transport else None
            self.run_moe_core = deep_ep.computing(lambda given: SimpleNamespace(hidden_states=self(*given[::2])))

        def __call__(self, hidden_states: Tensor, _: Any) -> Tensor:
            return cast(Tensor, recorder.note("experts", 3 * hidden_states))

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
            merge_branch=lambda whole, rows, *_: whole + rows,
        )

    parallel = SimpleNamespace(tp_size=2)
    patch.setattr(ffn, "get_parallel", lambda: parallel)
    patch.setattr(ffn, "should_skip_mlp_all_reduce", lambda: False)
    patch.setattr(ffn, "tensor_model_parallel_all_reduce", recorder.sum)
    patch.setattr(ffn.LongcatFFN, "partial", lambda self, rows: recorder.note(self.name, rows))
    patch.setattr(moe, "identity_share", lambda rows, _: recorder.note("identity", rows))
    patch.setattr(moe, "add_identity", lambda routed, rows, _: recorder.note("identity", routed + rows))
    patch.setattr(moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: transport is None))
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
        experts=Experts(),
        branch=branch,
    )
    return bare(
        model.LongcatDecoderLayer,
        self_attn=[Attention(0), Attention(1)],
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
    layer.mlp.branch.end = lambda moe, begun: begun.shortcut


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


# -- with DeepEP -----------------------------------------------------------------------------------------

DEEPEP_MODES = [DeepEPMode.NORMAL, DeepEPMode.LOW_LATENCY]


@pytest.mark.parametrize("mode", DEEPEP_MODES)
def test_with_deepep_a_layer_runs_in_the_four_stages_of_the_report(
    mode: DeepEPMode, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the zero experts, which are one operation with the sum of the two kinds of experts."""
    layer = a_layer(recorder, Exchange(), monkeypatch, mode)
    noted = order(layer, recorder)
    assert problems(noted, absent=()) == []
    planned = [
        {name for name in stage.operations if SHORTCUT_LAYER[name].resource is Resource.COMPUTE or name in TRANSPORT}
        for stage in SINGLE_BATCH.stages
    ]
    run = [{*main, *side} - {name for name in main if name.endswith("_sum")} for main, side in stages(noted)]
    assert run[-1] == {"identity"}
    assert [each - {"identity"} for each in planned] == [*run[:-1], set()]
    assert [side for _, side in stages(noted)] == [(), ("dispatch",), (), ("combine",), ()]


@pytest.mark.parametrize("mode", DEEPEP_MODES)
def test_with_deepep_a_layers_output_is_that_without_overlap(
    mode: DeepEPMode, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's rows are NaN until they are waited for."""
    layers = [a_layer(recorder, branch, monkeypatch, mode) for branch in (InARow(), Exchange())]
    batch: Any = None
    in_a_row, overlapped = (layer(X, batch, {}) for layer in layers)
    assert torch.equal(overlapped, in_a_row)
    assert not overlapped.isnan().any()


@pytest.mark.parametrize("pieces", ["is_in_breakable_cuda_graph", "is_in_tc_piecewise_cuda_graph"])
def test_with_deepep_a_graph_in_pieces_has_the_moe_first(
    pieces: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SGLang's own module, which knows how to leave such a graph."""
    monkeypatch.setattr(overlap, pieces, lambda: True)
    noted = order(a_layer(recorder, Exchange(), monkeypatch, DeepEPMode.NORMAL), recorder)
    assert {stream for stream, _ in noted} == {MAIN}
    names = [name for _, name in noted]
    assert names.index("identity") < names.index("dense_ffn_0")


def dispatch_not_waited_for(recorder: Recorder, layer: Any) -> None:
    recorder.note = _without_the(JOIN, 1, recorder.note)  # type: ignore[method-assign]


def combine_not_waited_for(recorder: Recorder, layer: Any) -> None:
    recorder.note = _without_the(JOIN, 2, recorder.note)  # type: ignore[method-assign]


def combine_left_out(recorder: Recorder, layer: Any) -> None:
    layer.mlp.experts.dispatcher.combine_b = lambda: X


def experts_before_their_tokens(recorder: Recorder, layer: Any) -> None:
    compute = layer.mlp.branch.compute
    layer.mlp.branch.compute = lambda moe, begun: (recorder.note("experts"), compute(moe, begun))[1]


def attention_before_its_input(recorder: Recorder, layer: Any) -> None:
    ffn = layer.mlps[0]
    layer.mlps[0] = lambda rows: (layer.self_attn[1].project(rows), ffn(rows))[1]


def _without_the(name: str, number: int, note: Callable[..., Any]) -> Callable[..., Any]:
    """`note`, but for the call of that name and number."""
    calls = count(1)
    return lambda noted, result=None: result if noted == name and next(calls) == number else note(noted, result)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (dispatch_not_waited_for, "experts in 1 reads dispatch, which is not done"),
        (combine_not_waited_for, "final_sum in 3 reads combine, which is not done"),
        (combine_left_out, "final_sum in 3 reads combine, which is not done"),
        (experts_before_their_tokens, "experts in 1 reads dispatch, which is not done"),
        (attention_before_its_input, "attention_1_qkv in 1 reads dense_ffn_0_sum, which is not done"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_the_order_with_deepep_is_found(
    fault: Callable[[Recorder, Any], None], found: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = a_layer(recorder, Exchange(), monkeypatch, DeepEPMode.NORMAL)
    fault(recorder, layer)
    assert found in problems(order(layer, recorder), absent=())


def test_sums_of_experts_cannot_be_asked_for_before_these_have_run(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = a_layer(recorder, Exchange(), monkeypatch, DeepEPMode.NORMAL)
    with pytest.raises(AttributeError, match="_combine_intermediate_state"):
        layer.mlp.end(layer.mlp.begin(X))


def test_what_receives_low_latency_sums_can_read_the_routing_again(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = a_layer(recorder, Exchange(), monkeypatch, DeepEPMode.LOW_LATENCY)
    computed = layer.mlp.compute(layer.mlp.begin(X))._replace(pending=None)
    with pytest.raises(AssertionError, match="its memory may be another's"):
        layer.mlp.end(computed)


def over_deepep(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each rank's tokens go through SGLang's dispatcher for DeepEP, to experts of its own."""
    deep_ep.install(Recorder(), monkeypatch)
    make = moe.LongcatMoE.__init__

    def made(self: Any, *given: Any, **named: Any) -> None:
        make(self, *given, **named)
        self.experts.dispatcher = deep_ep.dispatcher(DeepEPMode.NORMAL)
        self.experts.run_moe_core = deep_ep.computing(self.experts.run_moe_core)

    monkeypatch.setattr(moe.LongcatMoE, "__init__", made)
    monkeypatch.setattr(Cpu, "branch", lambda self: Exchange())


def test_tokens_may_be_on_their_way_while_the_dense_path_runs(checkpoint_of: Callable[[Case], Path]) -> None:
    """The dense path leaves alone what is sent, which is read as late as can be, and what zero experts read at the
    layer's end. Two ranks, each with a part of every expert."""
    with serving(checkpoint_of(CASE), tensor_parallel=2, broken=over_deepep) as served:
        assert_true(served)


# -- where it is used --------------------------------------------------------------------------------------


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
    ("asked", "has_transport", "kind"),
    [(True, False, SecondStream), (False, False, InARow), (True, True, Exchange), (False, True, InARow)],
)
def test_a_gpu_has_a_second_stream_or_four_stages_where_they_are_asked_for(
    asked: bool, has_transport: bool, kind: type[Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(requested, "current", lambda: Requested(overlap=asked or None))
    transport = SimpleNamespace(is_none=lambda: not has_transport)
    monkeypatch.setattr("sglang.srt.layers.moe.utils.get_moe_a2a_backend", lambda: transport)
    monkeypatch.setattr("sglang.srt.runtime_context.get_stream", made.append)
    assert type(Cuda().branch()) is kind
    assert made == (["longcat_moe"] if kind is SecondStream else [])


@pytest.mark.parametrize(
    ("asked", "transport", "said"),
    [
        (True, "none", "its MoE, on a second stream"),
        (True, "deepep", "tokens on their way to experts and back"),
        (False, "none", None),
        (False, "deepep", None),
    ],
)
def test_the_log_says_what_runs_beside_the_dense_path(
    asked: bool, transport: str, said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = settings(
        "cuda", enable_single_batch_overlap=asked, moe_a2a_backend=transport, moe_runner_backend="deep_gemm"
    )
    log, declared = settled(given, monkeypatch, caplog)
    assert ("beside the dense path" in log) is asked
    assert said is None or f"beside the dense path of a layer: {said}" in log
    if asked:
        assert declared.pop("enable_single_batch_overlap") is False, "SGLang would refuse it on Hopper"
        assert requested.of(SimpleNamespace(**declared)).overlap
    else:
        assert declared == {}


def test_the_log_says_why_nothing_runs_beside_the_dense_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, declared = settled(settings("cpu", enable_single_batch_overlap=True), monkeypatch, caplog)
    assert "no layer's MoE runs beside its dense path: a CPU has no streams" in log
    assert "enable_single_batch_overlap" not in declared


def test_sglang_still_refuses_its_own_overlap_on_hopper() -> None:
    """Otherwise `deployment.settle` could leave the option as it is given."""
    source = inspect.getsource(initialize_moe_config)
    assert "SBO (single batch overlap) is not supported on SM90 GPUs" in source


def settled(
    given: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> tuple[str, dict[str, Any]]:
    """The log of options that are fit to be served, and what is made of them."""
    declared: dict[str, Any] = {}
    monkeypatch.setattr(deployment.hooks, "install", lambda _: None)
    monkeypatch.setattr(deployment, "check", lambda *_: None)
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.resolving_view", lambda _: given)
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.model_config_of", lambda _: MODEL_CONFIG)
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.declare_resolution", lambda *_, **made: declared.update(made))
    with caplog.at_level("INFO"):
        deployment.settle(given)
    return caplog.text, declared

"""A decoder layer of vLLM's package that notes its operations, their streams and their scratch memory."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.v1.worker import workspace

from longcat_core.layers.routing import Routing
from longcat_vllm import ffn, model, moe
from longcat_vllm.devices.cuda import overlap
from longcat_vllm.devices.cuda.overlap import SecondStream
from tests.cases import DEFAULT
from tests.overlap import MAIN, SIDE, Recorder, problems, stages


class LaneRecorder(Recorder):
    """Also notes which scratch memory an operation would have."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: dict[str, int] = {}

    def note(self, name: str, result: Any = None) -> Any:
        self.lanes[name] = self.lane()
        return super().note(name, result)

    def lane(self) -> int:
        return workspace._workspace_lane.get()


def the_context(mode: CUDAGraphMode, patch: pytest.MonkeyPatch) -> None:
    """In place of vLLM's, where a step's mode of CUDA graphs is, and layers by name."""
    layers: dict[str, Any] = {}
    compilation = SimpleNamespace(static_forward_context=layers)
    patch.setattr(overlap, "get_current_vllm_config", lambda: SimpleNamespace(compilation_config=compilation))
    context = SimpleNamespace(no_compile_layers=layers, cudagraph_runtime_mode=mode)
    patch.setattr(overlap, "get_forward_context", lambda: context)


def runner_of(experts: Callable[[Tensor], Tensor]) -> Any:
    """In place of vLLM's."""

    class Runner:
        layer_name = "layers.0.mlp.experts"
        router = moe.PrecomputedRouting(top_k=2, num_experts=4)
        moe_config = SimpleNamespace(skip_final_all_reduce=True)

        def __call__(self, hidden_states: Tensor, packed: Tensor) -> Tensor:
            return experts(hidden_states)

    return Runner()


def a_layer(recorder: LaneRecorder, mode: CUDAGraphMode, patch: pytest.MonkeyPatch) -> Any:
    """`LongcatDecoderLayer` with the real order of calls, whose parts note that they are called."""
    the_context(mode, patch)
    patch.setattr(ffn, "tensor_model_parallel_all_reduce", recorder.sum)
    patch.setattr(ffn.LongcatFFN, "partial", lambda self, rows: recorder.note(self.name, rows.clone()))
    patch.setattr(moe, "identity_share", lambda rows, _: recorder.note("identity", rows))

    class Attention:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return self.attend(*self.project(rows, cos, sin))

        def project(self, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            recorder.note(f"attention_{self.number}_qkv")
            return rows, rows, rows

        def attend(self, rows: Tensor, *_: Tensor) -> Tensor:
            for part in ("core", "output", "sum"):
                recorder.note(f"attention_{self.number}_{part}")
            return rows

    def bare(cls: type[nn.Module], **attributes: Any) -> Any:
        module = object.__new__(cls)
        nn.Module.__init__(module)
        vars(module).update(attributes)
        return module

    def norm(rows: Tensor, residual: Tensor | None = None) -> Any:
        return rows if residual is None else (rows, residual)

    def router(rows: Tensor) -> Tensor:
        return cast(Tensor, recorder.note("router", rows))

    router.bias = None  # type: ignore[attr-defined]
    runner = runner_of(lambda rows: recorder.note("experts", rows.clone()))
    routing = Routing(torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2), torch.ones(3))
    experts = bare(
        moe.LongcatMoE,
        config=DEFAULT,
        is_sequence_parallel=False,
        router=router,
        placed=None,
        balancing=None,
        route=lambda *_, **__: routing,
        experts=runner,
        branch=SecondStream(runner),
    )
    return bare(
        model.LongcatDecoderLayer,
        self_attn=[Attention(0), Attention(1)],
        mlp=experts,
        mlps=[bare(ffn.LongcatFFN, name=f"dense_ffn_{number}") for number in range(2)],
        input_layernorm=[norm, norm],
        post_attention_layernorm=[norm, norm],
    )


def stand_in_for_streams(recorder: Recorder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "current_stream", lambda: recorder.stream(MAIN))
    patch.setattr(torch.cuda, "stream", recorder.in_stream)
    patch.setattr(overlap, "second_stream", lambda: recorder.stream(SIDE))


def all_problems(recorder: LaneRecorder) -> list[str]:
    shared = [
        f"{', '.join(side)} in the scratch memory of {main[0]}"
        for main, side in stages(recorder.noted)
        if {recorder.lanes[name] for name in main} & {recorder.lanes[name] for name in side}
    ]
    return [*shared, *problems(recorder.noted)]

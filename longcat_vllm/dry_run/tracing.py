"""torch.compile in a dry run: off, or traced without a compiler behind it, so that its graphs can be counted."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule
from vllm.compilation import backends

from longcat_core.planning.dry_run import Graph


@contextmanager
def disabled() -> Iterator[None]:
    """Small functions that vLLM compiles even with --enforce-eager are run as they are written."""
    with mock.patch.object(torch._dynamo.config, "disable", True):
        yield


@contextmanager
def graphs() -> Iterator[list[Graph]]:
    """Those that vLLM's backend is given while this lasts. vLLM traces with `fullgraph`: a break is an error."""
    found: list[Graph] = []
    original = backends.VllmBackend.__call__

    def noting(backend: Any, graph: GraphModule, *args: Any, **kwargs: Any) -> Any:
        compiled = original(backend, graph, *args, **kwargs)
        found.append(_graph(backend, graph))
        return compiled

    # What is compiled apart from the model goes to Inductor, which would compile for the GPU.
    eager = mock.patch("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **options: graph.forward)
    with mock.patch.object(backends.VllmBackend, "__call__", noting), eager:
        yield found


def _graph(backend: Any, graph: GraphModule) -> Graph:
    operators = Counter(_name_of(node.target) for node in graph.graph.nodes if node.op.startswith("call_"))
    pieces = sum(not piece.is_splitting_graph for piece in backend.piecewise_graphs)
    return Graph(model=backend.prefix or "model", pieces=pieces, operators=dict(operators.most_common()))


def _name_of(target: Any) -> str:
    """A method's is a text, an operator has one with its namespace, a function of Python its own."""
    if isinstance(target, str):
        return target
    return str(target.name() if hasattr(target, "_schema") else getattr(target, "__name__", target))

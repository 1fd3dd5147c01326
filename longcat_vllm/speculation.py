"""The draft worker's part in vLLM: with a gate, drafts that are unlikely to be accepted are not verified (C2T)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from torch import Tensor
from vllm.v1.core.sched.scheduler import Scheduler

from longcat_core.drafting import DraftGate, draft_features

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds

HELD_BACK = "vllm:spec_decode_num_draft_tokens_held_back"
METRICS_DIRECTORY = "LONGCAT_METRICS_DIRECTORY"
"""Variable: where processes of one server share what they count."""


class GatedDrafts:
    """What the draft model has drafted in this step, and the gate that judges it.

    No module: a gate's tensors are no weights of the model.
    """

    def __init__(self, gate: DraftGate) -> None:
        self._gate = gate
        self.begin()

    def begin(self) -> None:
        """Forget the last step's drafts."""
        self._features: list[Tensor] = []
        self._log_probability: Tensor | None = None

    def observe(self, logits: Tensor) -> None:
        """logits: [B, vocabulary], of which vLLM drafts the best; once for each draft of a chain, in order."""
        if self._log_probability is None:
            self._log_probability = torch.zeros(len(logits), device=logits.device)
        features, self._log_probability = draft_features(
            logits, logits.argmax(dim=-1), self._log_probability, depth=len(self._features) + 1
        )
        self._features.append(features)

    def passed(self, drafts: Tensor) -> list[list[int]]:
        """drafts: [B, k]. The leading ones of each chain that are worth verifying."""
        if not self._features:
            return drafts.tolist()
        lengths = self._gate.kept(torch.stack(self._features, dim=1)).tolist()
        return [chain[:length] for chain, length in zip(drafts.tolist(), lengths, strict=True)]


class GateScheduler(Scheduler):
    """vLLM's scheduler, which counts the drafts that a gate has held back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_name = self.vllm_config.model_config.served_model_name
        self._held_back = HeldBackDrafts(model_name, engine=self.vllm_config.parallel_config.data_parallel_index)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished() and not request.is_prefill_chunk:
                self._held_back.add(self.num_spec_tokens - len(drafts))


class HeldBackDrafts:
    """A counter of the server's `/metrics` that another process than its own counts.

    vLLM sends a fixed set of statistics from its scheduler to its server. This one goes through a file, in the format
    and with the collector that prometheus_client has for servers of several processes.
    """

    def __init__(self, model_name: str, engine: int) -> None:
        directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ[METRICS_DIRECTORY]
        self._values = MmapedDict(str(Path(directory) / f"counter_longcat{os.getpid()}.db"))
        self._key = mmap_key(
            HELD_BACK,
            f"{HELD_BACK}_total",
            ["model_name", "engine"],
            [model_name, str(engine)],
            "Number of draft tokens that a gate held back from verification.",
        )
        self.add(0)

    def add(self, drafts: int) -> None:
        value, _ = self._values.read_value(self._key)
        self._values.write_value(self._key, value + drafts, 0.0)

    @staticmethod
    def collect() -> None:
        """Have this process's `/metrics` show what is counted; harmless when called again."""
        global _metrics_directory
        if _metrics_directory is None:
            _metrics_directory = tempfile.TemporaryDirectory(prefix="longcat-metrics-")
            os.environ[METRICS_DIRECTORY] = _metrics_directory.name
            MultiProcessCollector(REGISTRY, _metrics_directory.name)


_metrics_directory: tempfile.TemporaryDirectory[str] | None = None

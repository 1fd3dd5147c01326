"""LoRA: which modules of LongCat-Flash an adapter may change in vLLM, and how others are refused."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.model_executor.models.utils import WeightsMapper

from longcat_core.config import LongcatConfig
from longcat_core.weights import names

if TYPE_CHECKING:
    from vllm.config.lora import LoRAConfig

ADAPTED = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of the attentions and of the dense FFNs, by their published names."""
PACKED = ("fused_qkv_a_proj", "gate_up_proj")
"""What vLLM calls those that it computes together; `--lora-target-modules` takes either name."""
NOT_ADAPTED = {
    "kv_b_proj": "attention folds it into the query and the output once, after loading, and would silently ignore an "
    "adapter's part, as vLLM's own MLA models do",
    "experts": "vLLM's LoRA kernels for experts are not known to skip zero experts, and there are none for a CPU",
    "classifier": "the router is computed in fp32 whatever the model's dtype is, and an adapter's part is not",
}
"""Modules that vLLM would accept an adapter for, and why this model does not."""
_ADVICE = f"wanted {', '.join(ADAPTED)} of attentions and dense FFNs"


def unsupported(lora: LoRAConfig | None) -> list[str]:
    """Entries of `--lora-target-modules` that no adapter can change here."""
    named = (lora.target_modules or []) if lora is not None else []
    return [
        f"lora_target_modules: {name!r}, {_ADVICE}{_because(name)}; leave it out of --lora-target-modules"
        for name in named
        if name.rpartition(".")[2] not in (*ADAPTED, *PACKED) or ".experts." in name
    ]


def restrict(lora: LoRAConfig | None) -> None:
    """Have vLLM wrap no module that an adapter cannot change here; it would try any linear layer, and all experts."""
    if lora is not None and lora.target_modules is None:
        lora.target_modules = list(ADAPTED)


@dataclass
class AdapterNames(WeightsMapper):
    """The names of an adapter's tensors, unchanged, if the model has what they change.

    vLLM asks a model's `hf_to_vllm_mapper` for each tensor of an adapter before it takes any of them. Left to itself
    it ignores modules that it has not wrapped.
    """

    config: LongcatConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        self._tensors = names.expected_tensors(self.config, with_mtp=False).keys()

    def get_rename_mapper(self) -> AdapterNames:
        return self

    def map_name(self, key: str) -> str:
        """
        Raises:
            ValueError: for a module that the model does not have, or that an adapter cannot change here.
        """
        module, is_adapters, _ = key.partition(".lora_")
        if not is_adapters:  # a published tensor, as vLLM's pooling models ask for
            return key
        is_expert = ".mlp.experts" in module
        if module.rpartition(".")[2] in ADAPTED and not is_expert and f"{module}.weight" in self._tensors:
            return key
        raise ValueError(
            f"the adapter changes {module}, {_ADVICE}{_because('experts' if is_expert else module)}; "
            "train it without, or merge it into the checkpoint"
        )


def _because(module: str) -> str:
    reason = NOT_ADAPTED.get(module.rpartition(".")[2])
    return f", as {reason}" if reason else " that the model has"

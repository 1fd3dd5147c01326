"""New weights for a running model: vLLM takes them layer by layer, and here no layer is left with a part of them.

`reload_weights` and vLLM's engines of weight transfer set a model's weights aside (`initialize_layerwise_reload`), load
published tensors in one call or in many, and put each layer back when all of it came, at the latest at the end
(`finalize_layerwise_reload`). What a layer lacks by then is uninitialised memory.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.names import SCALE_SUFFIX
from longcat_core.weights.plan import Target


class Update:
    """The published tensors of an update that have come so far. plan: as `load_plan`."""

    def __init__(self, plan: Mapping[str, Target]) -> None:
        self._plan = plan
        self._came: set[str] = set()
        self.waiting: dict[str, Tensor] = {}
        """FP8 weights to be dequantised whose scales did not come yet, and scales without their weights."""
        self._set_aside: Any = None
        self._source: tuple[Any, ...] | None = None

    def note_source(self, model_config: ModelConfig) -> None:
        """Of a checkpoint that was loaded: `reload_weights` writes its path into vLLM's configuration beforehand."""
        self._source = model_config.model, model_config.model_weights, model_config.revision

    def restore_source(self, model_config: ModelConfig) -> None:
        """After one that was not, so that a reload without a path reads the weights that are served."""
        if self._source is not None:
            model_config.model, model_config.model_weights, model_config.revision = self._source

    def follow(self, model: nn.Module) -> None:
        """Begin anew if vLLM has set other weights aside since: not every update is finished, as one that an engine of
        weight transfer makes to try it out."""
        set_aside = get_layerwise_info(model).kernel_tensors
        if set_aside is not self._set_aside:
            self.end()
            self._set_aside = set_aside

    def add(self, name: str) -> None:
        """
        Raises:
            CheckpointError: if it has come before: vLLM counts numbers, and takes it for one that is missing.
        """
        if name in self._came:
            raise CheckpointError(f"twice: {name} came before in this update; give every tensor once")
        self._came.add(name)

    def lacking(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers of vLLM's that came in part, by name, and which published tensors of each did not come."""
        modules = {_published(name): module for name, module in model.named_modules()}
        parameters = {_published(name) for name, _ in model.named_parameters()}
        begun = {_layer(self._plan[name]) for name in (*self._came, *self.waiting) if name in self._plan}
        found: dict[str, list[str]] = {}
        for name, target in self._plan.items():
            layer = _layer(target)
            if layer not in begun or target.parameter not in parameters or name in self._came:
                continue
            if target.expert is None or modules[layer].expert_map_manager.map_global_to_local(target.expert) >= 0:
                found.setdefault(layer, []).append(name + SCALE_SUFFIX if name in self.waiting else name)
        return found

    def written(self, model: nn.Module) -> list[str]:
        """The layers that have new weights already, by name."""
        there = {_published(name) for name, parameter in model.named_parameters() if not parameter.is_meta}
        targets = [self._plan[name] for name in self._came if name in self._plan]
        return sorted({_layer(target) for target in targets if target.parameter in there})

    def end(self) -> None:
        self._came.clear()
        self.waiting.clear()


def is_begun(model: nn.Module) -> bool:
    """Whether vLLM has set a model's weights aside for new ones."""
    return get_layerwise_info(model).can_load()


def is_checkpoint(weights: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether they are all that vLLM reads from a checkpoint: what `get_all_weights` of its loaders makes."""
    return getattr(weights, "__name__", "") == "get_all_weights"


def abandon(model: nn.Module, update: Update, model_config: ModelConfig, error: Exception) -> None:
    """End an update after an error. A layer that has all of its new weights keeps them; every other one gets back what
    it had.

    Raises:
        CheckpointError: from the error, if there are layers with new weights, to name them.
    """
    written = update.written(model)
    update.end()
    _forget(model, {_published(name) for name, _ in model.named_modules()})
    finalize_layerwise_reload(model, model_config)
    if written:
        raise CheckpointError(
            f"{error}\nThe update ended there. New weights are in {len(written)} of the model's layers already, and "
            f"those of before in all others; repeat the update before the model is used: {', '.join(written)}"
        ) from error


def finish(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """
    Raises:
        CheckpointError: listing what a layer lacks that came in part. It has got back what it had.
    """
    model.update.follow(model)
    lacking = model.update.lacking(model)
    model.update.end()
    _forget(model, lacking)
    original(model, *args, **kwargs)
    if lacking:
        missing = [name for names in lacking.values() for name in names]
        listed = "\n  ".join(f"missing: {name}" for name in missing)
        raise CheckpointError(
            f"the update had a part only of {', '.join(lacking)}: there the weights are those of before, in all other "
            f"layers that came the new ones; repeat it with all tensors ({len(missing)} problems):\n  {listed}"
        )


def _forget(model: nn.Module, layers: Container[str]) -> None:
    """Have vLLM think that nothing came for these, so that it puts their weights back."""
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if _published(name) in layers and info.can_load():
            info.load_numel = 0
            info.loaded_weights.clear()


def _layer(target: Target) -> str:
    return target.parameter.rpartition(".")[0]


def _published(name: str) -> str:
    """Of a module or parameter: with LoRA, vLLM puts a module around each one that adapters change."""
    return name.replace(".base_layer", "")

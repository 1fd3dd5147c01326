"""One training run, step by step: the model, its losses, its optimizer, and the state to go on from."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.nano.balance import BiasController, Routed, Watch, set_biases
from examples.nano.corpus import Batches
from examples.nano.curves import Curves, Measured
from examples.nano.growth import grown, stacked
from examples.nano.settings import Settings
from examples.nano.transfer import Kind, kind, learning_rate_share, std_share
from longcat_core.layers.routing import relative_load
from longcat_core.reference import MTP, LongcatForCausalLM

_INIT_STD = 0.02
_BETAS, _EPS = (0.9, 0.95), 1e-16
_LEAST_CONTROL = 0.1
"""Of the controllers' gains, at the end of the decay: while weights still move, so does what routers do."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DivergedError(ValueError):
    """A loss that is not finite, from which nothing more can be learned."""


class ResumeError(ValueError):
    """A saved state that this run cannot go on from; the message says why."""


class Part(NamedTuple):
    """What one part of a batch gave."""

    gradients: tuple[Tensor, ...]
    """Of the share of the part in the loss, by parameter."""
    loss: Tensor
    draft_loss: Tensor | None
    balance_loss: Tensor | None
    rows: Tensor
    """int64 [layers, FFN experts]: tokens of each."""
    tokens: int
    """That went through the layers."""


class Trainer:
    """Everything random comes from the seed and the step, so that a state needs no random generator's."""

    def __init__(self, settings: Settings, stream: Tensor, device: torch.device, threads: int = 1) -> None:
        """stream: int32 [tokens] to train on; threads: as many parts of a batch run at once."""
        self.settings, self.device = settings, device
        self.batches = Batches(stream, settings.batch_size, settings.sequence_length, settings.seed)
        # Within a part one thread does everything: more would wait for each other at every small operation.
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._text = hashlib.sha256(stream.numpy().tobytes()).hexdigest()
        self.step = 0
        self.seconds = 0.0
        """Of training so far, whoever ran it; kept here, so that a run that goes on counts them."""
        self.curves = Curves.empty()
        layers = settings.model.num_layers // 2 if settings.grows_at > 0 else settings.model.num_layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = LongcatForCausalLM(settings.model.config(layers), with_mtp=False)
            initialize(self.model, settings.width_ratio)
        self.model.to(device)
        self.controller = BiasController(settings, layers)
        self.optimizer = self._new_optimizer()

    # -- a step ------------------------------------------------------------------------------------------

    def train_step(self) -> Measured:
        """One step of the schedule: grow or add the draft layer where it is due, then learn from one batch.

        Raises:
            DivergedError: if the loss is not finite; nothing was learned from the batch.
        """
        settings = self.settings
        if self.step == settings.grows_at > 0:
            self._grow()
        if self.step == settings.drafts_from:
            self._add_draft_layer()
        rate = settings.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate * group["share"]

        with Watch(self.model, settings) as watch:
            parts = self._parts(watch)
        loss = sum(float(part.loss) for part in parts) / settings.parts
        if not math.isfinite(loss):
            raise DivergedError(f"step {self.step + 1}: a loss of {loss}; lower the learning_rate of the settings")
        # Summed in the order of the parts, whichever was done first.
        for parameter, *gradients in zip(self.model.parameters(), *(part.gradients for part in parts), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0])
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        rows = torch.stack([part.rows for part in parts]).sum(dim=0)
        tokens = sum(part.tokens for part in parts)
        set_biases(self.model, self.controller.update(rows, tokens, max(rate, _LEAST_CONTROL)))
        self.step += 1
        by_device = rows.unflatten(1, (settings.device_balance.devices, -1)).sum(dim=2)
        return Measured(
            loss=loss,
            draft_loss=_mean([part.draft_loss for part in parts]),
            balance_loss=_mean([part.balance_loss for part in parts]),
            ffn_experts=(rows.sum(dim=1) / tokens).tolist(),
            imbalance=relative_load(rows).amax(dim=1).tolist(),
            device_imbalance=relative_load(by_device).amax(dim=1).tolist(),
        )

    def _parts(self, watch: Watch) -> list[Part]:
        """Those of this step's batch, side by side."""
        parts = self.settings.parts
        ids = self.batches[self.step].to(self.device)
        return list(self._pool.map(self._part, range(parts), ids.chunk(parts), repeat(watch)))

    def _part(self, index: int, ids: Tensor, watch: Watch) -> Part:
        """Losses and gradients of one part of the batch, in a thread of its own."""
        settings = self.settings
        # Without the cache of cast weights, which threads would share.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16, cache_enabled=False):
            logits, hidden, _ = self.model(ids)
            routed = watch.take()
            draft_losses = self._draft_losses(hidden, ids, logits, index) if self.model.model.mtp is not None else []
        main_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return self._learned(main_loss, draft_losses, routed, ids.numel())

    def _learned(self, main_loss: Tensor, draft_losses: list[Tensor], routed: list[Routed], tokens: int) -> Part:
        """The whole loss of a part, and its gradients.

        routed: by layer, what the routers did with the part's tokens.
        """
        settings = self.settings
        loss = main_loss
        if draft_losses:
            loss = loss + settings.draft_layer.weight * torch.stack(draft_losses).mean()
        balance_losses = [each.loss for each in routed if each.loss is not None]
        balance_loss = torch.stack(balance_losses).sum() if balance_losses else None
        if balance_loss is not None:
            loss = loss + settings.device_balance.coefficient * balance_loss
        # Where all tokens of a layer went to zero experts, there is no path to its FFN experts: their gradients are 0.
        parameters = list(self.model.parameters())
        return Part(
            gradients=torch.autograd.grad(loss / settings.parts, parameters, materialize_grads=True),
            loss=main_loss.detach(),
            draft_loss=draft_losses[0].detach() if draft_losses else None,
            balance_loss=None if balance_loss is None else balance_loss.detach(),
            rows=torch.stack([each.rows for each in routed]),
            tokens=tokens,
        )

    def _draft_losses(self, hidden: Tensor, ids: Tensor, logits: Tensor, index: int) -> list[Tensor]:
        """The loss of the first draft at every position, and in some batches those of the drafts after it.

        Each is the cross-entropy, in nats a token, with what the model itself says likeliest there: that, and not the
        text, is what greedy verification compares a draft with.

        In an engine's chain, a draft after the first is made from the layer's own output at the position before, while
        positions further back keep what the target's hidden states made of them. Here each pass takes the own
        output of the pass before at half of the positions, drawn at random: one pass a depth, and what a position
        attends to is as mixed as in a chain.
        """
        settings = self.settings.draft_layer
        deep = self.step % settings.deep_every == 0
        target, tokens, likeliest = hidden[:, :-1], ids[:, 1:], logits[:, 1:].argmax(dim=-1).flatten()
        drafted, own, _ = self.model.draft(target, tokens)
        losses = [F.cross_entropy(drafted.flatten(0, 1).float(), likeliest)]
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, self.step * self.settings.parts + index))
        for _ in range(1, settings.depth if deep else 1):
            shifted = torch.cat((target[:, :1], own[:, :-1]), dim=1)
            takes_own = (torch.rand(tokens.shape, generator=generator) < 0.5).to(self.device).unsqueeze(-1)
            drafted, own, _ = self.model.draft(torch.where(takes_own, shifted, target), tokens)
            losses.append(F.cross_entropy(drafted.flatten(0, 1).float(), likeliest))
        return losses

    # -- what changes on the way -------------------------------------------------------------------------

    def _grow(self) -> None:
        before = self.optimizer_tensors()
        layers = self.model.config.num_layers
        self.model = grown(self.model, self.settings.model.config())
        self.controller.grow()
        self.optimizer = self._new_optimizer()
        names = [name for name, _ in self.model.named_parameters()]
        for moment in (*_MOMENTS, "step"):
            of_moment = {
                name.removesuffix(f"/{moment}"): t for name, t in before.items() if name.endswith(f"/{moment}")
            }
            self._load_moment(moment, stacked(of_moment, names, layers))

    def _add_draft_layer(self) -> None:
        self.model.model.mtp = self._new_draft_layer().to(self.device)
        before = self.optimizer_tensors()
        self.optimizer = self._new_optimizer()
        self.load_optimizer_tensors(before)

    def _new_draft_layer(self) -> MTP:
        """An MTP layer whose embedding begins as a copy of the model's own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed + 1)
            mtp = MTP(self.model.config)
            initialize(mtp, self.settings.width_ratio)
        mtp.embed_tokens.weight.data.copy_(self.model.model.embed_tokens.weight.data)
        return mtp

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; norms do not decay. A kind's share of the learning rate is one of its decay, too, for AdamW multiplies
        them. Moments are made at a parameter's first gradient."""
        settings = self.settings
        groups = [
            {
                "params": [p for name, p in self.model.named_parameters() if kind(name, p) is each],
                "weight_decay": 0.0 if each is Kind.norm else settings.weight_decay,
                "share": learning_rate_share(each, settings.width_ratio),
            }
            for each in Kind
        ]
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=_BETAS, eps=_EPS, fused=True)

    # -- state -------------------------------------------------------------------------------------------

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """By parameter and moment, `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
        state = self.optimizer.state
        return {
            f"{name}/{moment}": state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            if parameter in state
            for moment in (*_MOMENTS, "step")
        }

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `optimizer_tensors`."""
        for moment in (*_MOMENTS, "step"):
            suffix = f"/{moment}"
            self._load_moment(moment, {n.removesuffix(suffix): t for n, t in tensors.items() if n.endswith(suffix)})

    def _load_moment(self, moment: str, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            self.optimizer.state[parameters[name]][moment] = tensor.to(self.device).clone()

    def save(self, path: Path) -> None:
        """One safetensors file, which appears whole or not at all: weights, moments, controllers, step and curves."""
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        if self.settings.model.tie_word_embeddings:
            del tensors["model/lm_head.weight"]
        tensors |= {f"optimizer/{n}": t for n, t in self.optimizer_tensors().items()}
        tensors |= {f"controller/{n}": t for n, t in self.controller.state_dict().items()}
        metadata = {
            "settings": self.settings.model_dump_json(),
            "step": str(self.step),
            "seconds": str(self.seconds),
            "curves": json.dumps(asdict(self.curves)),
            "text": self._text,
        }
        unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
        try:
            save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, unfinished, metadata)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def settings_of(path: Path) -> Settings:
        """Those of the run that wrote the state.

        Raises:
            OSError: if the file cannot be read.
            ResumeError: if it is not such a state.
        """
        return Settings.model_validate_json(_metadata(path)["settings"])

    @classmethod
    def resumed(cls, path: Path, stream: Tensor, device: torch.device, threads: int = 1) -> Trainer:
        """The run that wrote the state, with its settings, as it was after the last step that it had done.

        Raises:
            OSError: if the file cannot be read.
            ResumeError: if it is not such a state, or of a run on another text.
        """
        metadata = _metadata(path)
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        trainer = cls(Settings.model_validate_json(metadata["settings"]), stream, device, threads)
        if trainer._text != metadata["text"]:
            raise ResumeError(
                f"{path}: its run was trained on another text, {metadata['text'][:12]}, than there is now, "
                f"{trainer._text[:12]}; give the same --library and Python"
            )
        trainer.step, trainer.seconds = int(metadata["step"]), float(metadata["seconds"])
        trainer.curves = Curves(**json.loads(metadata["curves"]))
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "controller": {}}
        for name, tensor in tensors.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor
        layers = len(parts["controller"]["integral"])
        with_mtp = any(".mtp." in name for name in parts["model"])
        model = LongcatForCausalLM(trainer.settings.model.config(layers), with_mtp=with_mtp)
        model.load_state_dict(parts["model"], strict=not trainer.settings.model.tie_word_embeddings)
        trainer.model = model.to(device)
        trainer.controller = BiasController(trainer.settings, layers)
        trainer.controller.load_state_dict(parts["controller"])
        trainer.optimizer = trainer._new_optimizer()
        trainer.load_optimizer_tensors(parts["optimizer"])
        return trainer


def initialize(module: nn.Module, width_ratio: float = 1.0) -> None:
    """Normal weights, as widely spread as `initial_std` has it; norms are 1, biases of routers 0."""
    for name, parameter in module.named_parameters():
        if kind(name, parameter) is not Kind.norm:
            nn.init.normal_(parameter, std=initial_std(name, parameter, width_ratio))


def initial_std(name: str, matrix: Tensor, width_ratio: float) -> float:
    """0.02 for embeddings and, at the proxy's width, the head; for other matrices 0.5 over the root of their inputs,
    and half of that for what is added to the residual stream.

    At these sizes 0.02 for every matrix makes the first steps slow. The root of the inputs is the rule of `transfer` by
    itself, where all widths grow alike.
    """
    of = kind(name, matrix)
    if of is not Kind.hidden:
        return _INIT_STD * std_share(of, width_ratio)
    std = 0.5 / math.sqrt(matrix.shape[-1])
    return std / 2.0 if name.endswith(("o_proj.weight", "down_proj.weight", ".w2")) else std


def _mean(losses: Sequence[Tensor | None]) -> float | None:
    """None where there are none."""
    present = [float(loss) for loss in losses if loss is not None]
    return sum(present) / len(present) if present else None


def _seed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63


def deterministic() -> None:
    """Only kernels that give equal results on equal input, on every device; and one thread for each, for how a
    reduction is split among threads changes its last bits."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except SafetensorError as error:
        raise ResumeError(f"{path}: truncated or not safetensors ({error}); remove it, and begin again") from None
    if not {"settings", "step", "seconds", "curves", "text"} <= metadata.keys():
        raise ResumeError(f"{path}: not the state of a training run; remove it, and begin again")
    return metadata

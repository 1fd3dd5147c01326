"""All that decides what a training run of LongCat-Nano makes: sizes, schedule, and a switch for each mechanism."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from longcat_cli import example_tokenizer
from longcat_core import spellings
from longcat_core.config import LongcatConfig

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


_WIDTHS = (
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
)
"""What of a model's sizes grows with its width."""


class SettingsError(ValueError):
    """Settings that cannot be trained with; the message says which, and what is wanted."""


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Group):
    """Sizes, in LongCat's proportions where 8 M parameters allow them: FFN to zero experts 2 to 1, a dense FFN twice as
    wide as the hidden size, many small experts, and two in three choices of experts are to be FFN experts.

    The ranks and head dimensions are multiples of 16, and halve for TP 2. GPU kernels for MLA that take only the
    published 512 + 64 do not take them: a latent of 512 alone would be most of a model of this size.
    """

    vocab_size: int = Field(default=2048, ge=example_tokenizer.MIN_VOCAB_SIZE)
    hidden_size: Count = 256
    num_layers: Count = 2
    num_attention_heads: Count = 4
    q_lora_rank: Count = 96
    kv_lora_rank: Count = 64
    qk_nope_head_dim: Count = 32
    qk_rope_head_dim: Count = 16
    v_head_dim: Count = 32
    ffn_hidden_size: Count = 512
    expert_ffn_hidden_size: Count = 64
    n_routed_experts: Count = 32
    zero_expert_num: int = Field(default=16, ge=0)
    moe_topk: Count = 6
    routed_scaling_factor: float = 6.0
    max_position_embeddings: Count = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def config(self, num_layers: int | None = None) -> LongcatConfig:
        """The model's configuration, with another number of decoder layers if one is given.

        Raises:
            ConfigError: if it is none.
        """
        return spellings.read(self.model_dump() | ({} if num_layers is None else {"num_layers": num_layers}))

    def at_width(self, hidden_size: int) -> Model:
        """One in the same proportions: more heads or fewer, of the same size; the same layers, experts and choices.

        Raises:
            SettingsError: if a size would not be a whole number.
        """
        widths = {name: getattr(self, name) * hidden_size for name in _WIDTHS}
        for name, width in widths.items():
            if width % self.hidden_size:
                raise SettingsError(
                    f"hidden_size: {hidden_size}, by which model.{name} would be {width / self.hidden_size:g}, "
                    "wanted a whole number"
                )
        return self.model_copy(update={name: width // self.hidden_size for name, width in widths.items()})


class ZeroExperts(Group):
    """The PID controller that holds the mean FFN experts a token (report, section 2.1.1). Gains are in units of the
    mean score, 1 / (FFN and zero experts), for an error given as a share of the top k."""

    controlled: bool = True
    target: float = Field(default=4.0, gt=0)
    """FFN experts a token; 8 of 12 in LongCat-Flash, the ratio is kept."""
    proportional: float = 1.0
    integral: float = 0.3
    derivative: float = 0.2


class BiasBalance(Group):
    """The update of each FFN expert's bias by its load, without a loss (report, section 2.1.1; arXiv 2408.15664)."""

    enabled: bool = True
    rate: float = Field(default=0.05, gt=0)
    """In units of the mean score, a step, for an expert that no token took."""


class DeviceBalance(Group):
    """The balance loss over devices, zero experts being one group more (report, section 2.1.1)."""

    enabled: bool = True
    devices: Count = 4
    coefficient: float = Field(default=1e-2, gt=0)


class DraftLayer(Group):
    """The MTP layer, added late (report, section 3)."""

    enabled: bool = True
    begins: Share = 0.7
    """Of the steps."""
    weight: float = Field(default=0.3, gt=0)
    depth: int = Field(default=3, ge=1, le=16)
    """Drafts of a chain that it is trained for."""
    deep_every: Count = 4
    """One batch in this many is trained to that depth, the others to depth 1."""


class Growth(Group):
    """Training at half depth first, then stacking the layers to full depth (report, section 3)."""

    enabled: bool = False
    at: Share = 0.4
    """Of the steps."""


class Settings(Group):
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=6000, ge=1)
    batch_size: Count = 8
    parts: Count = 2
    """Of a batch, which are computed side by side on a CPU, one thread each. Their number changes the result, as the
    balance loss is taken over each part; how many threads there are does not."""
    sequence_length: int = Field(default=256, ge=8)
    learning_rate: float = Field(default=2e-3, gt=0)
    proxy_hidden_size: Count | None = None
    """The hidden size of the narrower model that the learning rate was found for, by whose rules (`transfer`) this one
    begins and learns; None where it was found for this one."""
    warmup_steps: int = Field(default=50, ge=0)
    decay: Share = 0.5
    """The share of the steps, at the end, over which the rate falls to nothing; it is constant before (WSD)."""
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    bf16: bool = True
    """Matrix products in bf16 (autocast); weights, optimizer, router and losses are fp32 always."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The share of the files that is not trained on, about."""
    chats: Share = 0.25
    """The share of the functions with a docstring that are trained on as conversations, too."""
    record_every: Count = 10
    measure_every: Count = 100
    save_every: Count = 200
    model: Model = Model()
    zero_experts: ZeroExperts = ZeroExperts()
    bias_balance: BiasBalance = BiasBalance()
    device_balance: DeviceBalance = DeviceBalance()
    draft_layer: DraftLayer = DraftLayer()
    growth: Growth = Growth()

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        model, target = self.model, self.zero_experts.target
        least = max(0, model.moe_topk - model.zero_expert_num)
        if not model.zero_expert_num and self.zero_experts.controlled:
            raise ValueError("model.zero_expert_num: 0; without zero experts, wanted zero_experts.controlled false")
        if model.zero_expert_num and not least < target < model.moe_topk:
            raise ValueError(
                f"zero_experts.target: {target:g} FFN experts a token, wanted between {least} and {model.moe_topk}"
            )
        if model.n_routed_experts % self.device_balance.devices:
            raise ValueError(
                f"device_balance.devices: {self.device_balance.devices}, wanted a divisor of the "
                f"{model.n_routed_experts} FFN experts"
            )
        if self.growth.enabled and model.num_layers % 2:
            raise ValueError(f"model.num_layers: {model.num_layers}, wanted an even number, for growth doubles it")
        if self.growth.enabled and self.grows_at >= self.steps:
            raise ValueError(f"growth.at: {self.growth.at:g} of {self.steps} steps, wanted some after it")
        if self.batch_size % self.parts:
            raise ValueError(f"parts: {self.parts}, wanted a divisor of the batch of {self.batch_size}")
        if self.proxy_hidden_size is not None and model.tie_word_embeddings:
            raise ValueError(
                f"proxy_hidden_size: {self.proxy_hidden_size} with model.tie_word_embeddings, wanted it false, for "
                "embedding and head have different rules"
            )
        if self.sequence_length > model.max_position_embeddings:
            raise ValueError(
                f"sequence_length: {self.sequence_length}, wanted at most model.max_position_embeddings, "
                f"{model.max_position_embeddings}"
            )
        return self

    @property
    def width_ratio(self) -> float:
        """The hidden size over the proxy's; 1 without one."""
        return self.model.hidden_size / (self.proxy_hidden_size or self.model.hidden_size)

    # -- the schedule ------------------------------------------------------------------------------------

    @property
    def grows_at(self) -> int:
        """The step before which the model grows to full depth; 0 where it has it from the start."""
        return round(self.growth.at * self.steps) if self.growth.enabled else 0

    @property
    def drafts_from(self) -> int | None:
        """The step before which the MTP layer is added: not before the model has grown. None where it never is."""
        if not self.draft_layer.enabled:
            return None
        return max(self.grows_at, min(round(self.draft_layer.begins * self.steps), self.steps - 1))

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step from 0: warm-up, constant, linear decay. The controllers' gains
        follow it, as the report lets the bias's rate decay, but not to nothing."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / (self.warmup_steps + 1), left)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """A copy with other values, by dotted name; None changes nothing.

        Raises:
            SettingsError: if a value, or the combination, is not valid.
        """
        content = self.model_dump()
        for name, value in changes.items():
            if value is not None:
                *groups, field = name.split(".")
                place = content
                for group in groups:
                    place = place[group]
                place[field] = value
        try:
            return Settings.model_validate(content)
        except ValidationError as error:
            raise SettingsError(str(error)) from None

    # -- files -------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Settings:
        """From a JSON file: settings alone, or a training record that has them under `settings`.

        Raises:
            OSError: if the file cannot be read.
            SettingsError: if it is not JSON, or not settings.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(content.get("settings", content) if isinstance(content, dict) else content)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: not JSON ({error})") from None
        except ValidationError as error:
            raise SettingsError(f"{path}: {error}") from None


PRESETS = {
    "cpu": Settings(),
    "gpu": Settings(batch_size=64, parts=1, sequence_length=512, steps=1000),
    "tiny": Settings(
        batch_size=2,
        sequence_length=32,
        steps=20,
        warmup_steps=4,
        record_every=1,
        measure_every=8,
        save_every=5,
        model=Model(
            vocab_size=320,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            ffn_hidden_size=64,
            expert_ffn_hidden_size=16,
            n_routed_experts=8,
            zero_expert_num=4,
        ),
    ),
}
"""By name: two cores for an hour; a GPU for some minutes; seconds, to try the trainer itself."""

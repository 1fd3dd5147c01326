"""What FP8 would do to each linear layer, measured on a text in the reference, with few weights in memory at a time."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.layers import rotary
from longcat_core.layers.experts import add_identity, ffn_by_expert, routed_experts
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.reference import DecoderLayer, DenseFFN, LatentAttention, MTPBlock, RMSNorm, Router, ZeroExpertMoE
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks
from longcat_core.weights.names import MTP_PREFIX
from longcat_core.weights.streaming import PublishedTensors

_ACTIVATION_BLOCK = (1, PUBLISHED_BLOCK[1])
"""Of a layer's inputs that share a scale, taken anew for each token (report, section on quantisation)."""


class CalibrationError(ValueError):
    """A model or a text that nothing can be measured on; the message says why."""


@dataclass(frozen=True)
class Measured:
    """One linear layer y = W x on R rows x, beside the layer in FP8 by blocks, weights and inputs."""

    rows: int
    """0 for an expert that no token of the text took; then only `weight_error` says something."""
    largest_input: float
    """The greatest magnitude among the inputs."""
    weight_error: float
    """Norm of the error of W over the norm of W (Frobenius)."""
    output_error: float
    """Norm of the error of all y over the norm of all y."""
    output_error_rms: float
    """Root mean square of the error of y's elements, in the units of y: the absolute error."""


def fp8_inputs(x: Tensor) -> Tensor:
    """Inputs [..., columns] of a linear layer in FP8, rounded as engines round them on a GPU, in fp32."""
    rows = x.flatten(0, -2)
    return dequantize_blocks(*quantize_blocks(rows, _ACTIVATION_BLOCK), block=_ACTIVATION_BLOCK).view_as(x)


class _Observer:
    """Measures one layer, whose rows may come in several calls."""

    def __init__(self, weight: Tensor) -> None:
        self._rounded = dequantize_blocks(*quantize_blocks(weight))
        self._weight_error = _ratio(_squares(self._rounded - weight), _squares(weight))
        self._rows, self._outputs, self._largest = 0, 0, 0.0
        self._error = self._total = 0.0

    def see(self, inputs: Tensor, outputs: Tensor) -> None:
        """inputs: fp32 [R, columns]; outputs: fp32 [R, rows of W], W x."""
        largest = float(inputs.abs().max())
        if not math.isfinite(largest):
            raise CalibrationError(
                "inputs that are not finite; the weights, or the text's tokens, are not this model's"
            )
        self._largest = max(self._largest, largest)
        self._error += _squares(F.linear(fp8_inputs(inputs), self._rounded) - outputs)
        self._total += _squares(outputs)
        self._rows += inputs.shape[0]
        self._outputs += outputs.numel()

    def measured(self) -> Measured:
        return Measured(
            rows=self._rows,
            largest_input=self._largest,
            weight_error=self._weight_error,
            output_error=_ratio(self._error, self._total),
            output_error_rms=math.sqrt(self._error / max(1, self._outputs)),
        )


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _ratio(error: float, total: float) -> float:
    return math.sqrt(error / total) if total else 0.0


@torch.no_grad()
def calibrate(
    tensors: PublishedTensors,
    config: LongcatConfig,
    tokens: Tensor,
    report: Callable[[str], object] = lambda layer: None,
) -> dict[str, Measured]:
    """Measure every linear layer that may be in FP8 while the model, in fp32, reads a text. By name, without `.weight`.

    tokens: int64 [sequences, length], each sequence read from its beginning. The reference's layers run one after
    another over all sequences; in memory are the hidden states of all tokens, and the weights of one attention, of
    one dense FFN or of one expert. `report` is called with the name of each layer that is measured.

    Raises:
        CalibrationError: if the inputs of a layer are not finite; it is named.
    """
    return _Calibration(tensors, config, report).run(tokens)


class _Calibration:
    def __init__(self, tensors: PublishedTensors, config: LongcatConfig, report: Callable[[str], object]) -> None:
        self._tensors, self.config, self._report = tensors, config, report
        self._found: dict[str, Measured] = {}

    def run(self, tokens: Tensor) -> dict[str, Measured]:
        config = self.config
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        angles = rotary.inverse_frequencies(config), rotary.attention_factor(config.rope)
        cos, sin = rotary.cos_sin(positions, *angles)
        x = self._embedded("model.embed_tokens.weight", tokens)
        for n in range(config.num_layers):
            x, _ = self._streamed(DecoderLayer, f"model.layers.{n}")(x, cos, sin, None)
        if f"{MTP_PREFIX}embed_tokens.weight" in self._tensors.shapes and tokens.shape[1] > 1:
            with torch.device("meta"):
                norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            with self.loaded(norm, "model.norm"):
                hidden = norm(x)[:, :-1]
            embedded = self._embedded(f"{MTP_PREFIX}embed_tokens.weight", tokens[:, 1:])
            block = self._streamed(MTPBlock, f"{MTP_PREFIX}layers.0")
            block(embedded, hidden, cos[:, :-1], sin[:, :-1], None)
        return self._found

    def _embedded(self, name: str, tokens: Tensor) -> Tensor:
        return self._tensors.read(name)[tokens].float()

    def _streamed(self, kind: type[DecoderLayer] | type[MTPBlock], name: str) -> nn.Module:
        """The reference's layer, none of whose weights are in memory before they are needed."""
        with torch.device("meta"):
            layer = kind(self.config)
        self._stream(layer, name)
        return layer

    def _stream(self, parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            path = f"{prefix}.{name}"
            if isinstance(child, ZeroExpertMoE):
                parent.register_module(name, _StreamedMoE(child.router, path, self))
            elif isinstance(child, (LatentAttention, DenseFFN, RMSNorm, nn.Linear)):
                parent.register_module(name, _Streamed(child, path, self))
            else:
                self._stream(child, path)

    @contextmanager
    def loaded(self, module: nn.Module, name: str) -> Iterator[None]:
        """Within the `with` block the module has its weights, and its linear layers that may be in FP8 are measured."""
        state = {key: self._tensors.read(f"{name}.{key}").float() for key in module.state_dict()}
        module.load_state_dict(state, assign=True)
        observed, hooks = {}, []
        for part, linear in module.named_modules():
            path = f"{name}.{part}" if part else name
            if isinstance(linear, nn.Linear) and not isinstance(module, Router):
                observed[path] = _Observer(linear.weight)
                hooks.append(linear.register_forward_hook(self._hook(observed[path], path)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            module.to("meta")
        for path, observer in observed.items():
            self._note(path, observer)

    def _hook(self, observer: _Observer, path: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def see(module: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
            self._see(observer, path, inputs[0].flatten(0, -2), outputs.flatten(0, -2))

        return see

    def product(self, path: str, rows: Tensor) -> Tensor:
        """W x of a linear layer that is loaded for it, and measured: an expert's. rows: fp32 [R, columns]."""
        weight = self._tensors.read(f"{path}.weight").float()
        outputs = F.linear(rows, weight)
        observer = _Observer(weight)
        if len(rows):
            self._see(observer, path, rows, outputs)
        self._note(path, observer)
        return outputs

    def _see(self, observer: _Observer, path: str, inputs: Tensor, outputs: Tensor) -> None:
        try:
            observer.see(inputs, outputs)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from None

    def _note(self, path: str, observer: _Observer) -> None:
        self._found[path] = observer.measured()
        self._report(path)


class _Streamed(nn.Module):
    """A module of the reference that has its weights only while it runs, on one sequence after another."""

    def __init__(self, module: nn.Module, name: str, calibration: _Calibration) -> None:
        super().__init__()
        self.module, self.name, self.calibration = module, name, calibration

    def forward(self, x: Tensor, *others: Tensor | None) -> Tensor | tuple[Tensor, None]:
        """x: [sequences, T, columns]; others: as the module has them, the same for every sequence."""
        with self.calibration.loaded(self.module, self.name):
            outputs = [self.module(sequence, *others) for sequence in x.split(1)]
        if isinstance(self.module, LatentAttention):  # which also returns its cache
            return torch.cat([attended for attended, _ in outputs]), None
        return torch.cat(outputs)


class _StreamedMoE(nn.Module):
    """`ZeroExpertMoE`, which loads each expert for the rows of all sequences that took it."""

    def __init__(self, router: Router, name: str, calibration: _Calibration) -> None:
        super().__init__()
        self.router, self.name, self.calibration = router, name, calibration

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        with self.calibration.loaded(self.router, f"{self.name}.router"):
            routing = self.router(tokens)
        experts = self.calibration.config.n_routed_experts
        ffn = ffn_by_expert(experts, self._gate_up, lambda expert, rows: self._product(expert, "down", rows))
        routed = routed_experts(tokens, routing.ids, routing.weights, ffn)
        # Nothing is known of what the others would be given, but how well FP8 holds their weights.
        for expert in sorted(set(range(experts)) - set(routing.ids.flatten().tolist())):
            inner = self._gate_up(expert, tokens[:0]).chunk(2, dim=-1)[0]
            self._product(expert, "down", inner)
        return add_identity(routed, tokens, routing.identity).view_as(x)

    def _gate_up(self, expert: int, rows: Tensor) -> Tensor:
        return torch.cat([self._product(expert, part, rows) for part in ("gate", "up")], dim=-1)

    def _product(self, expert: int, part: str, rows: Tensor) -> Tensor:
        return self.calibration.product(f"{self.name}.experts.{expert}.{part}_proj", rows)

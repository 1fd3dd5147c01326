"""FP8 by blocks: which tensors are in it, and the arithmetic against an independent statement of it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import ConfigError
from longcat_core.quantization import Quantization
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import FP8, dequantize_blocks, quantize_blocks, scale_shape
from longcat_core.weights.precision import require_precision
from tests.cases import DEFAULT

RAW = spellings.published(DEFAULT)
PUBLISHED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def read(**fields: Any) -> Quantization:
    found = spellings.read({**RAW, **fields}).quantization
    assert found is not None
    return found


def test_a_release_in_bf16_has_no_quantisation() -> None:
    assert spellings.read(RAW).quantization is None
    assert spellings.read({**RAW, "disable_quant_module": ["mtp"]}).quantization is None


@pytest.mark.parametrize("more", [{"scale_fmt": "ue8m0"}, {"quant_method": "compressed-tensors", "config_groups": {}}])
def test_an_engine_reads_all_fields_of_a_quantisation(more: dict[str, Any]) -> None:
    raw = {**RAW, "quantization_config": PUBLISHED | more, "disable_quant_module": ["mtp"]}
    for found in (spellings.for_sglang(raw), spellings.for_transformers(raw)):
        assert found["quantization_config"] == raw["quantization_config"]
        assert found["disable_quant_module"] == ["mtp"]


def test_published_fields_are_read() -> None:
    found = read(
        quantization_config=PUBLISHED | {"ignored_layers": ["model.layers.0.mlps.0.down_proj"]},
        disable_quant_module=["mtp"],
    )
    assert found == Quantization(
        "fp8", "e4m3", "dynamic", (128, 128), ignored=("model.layers.0.mlps.0.down_proj",), disabled=("mtp",)
    )
    assert found.problems() == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quant_method": "gptq"}, "quant_method: 'gptq', wanted 'fp8'"),
        ({"fmt": "e5m2"}, "fmt: 'e5m2', wanted 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme: 'static', wanted 'dynamic'"),
        ({"weight_block_size": None}, "weight_block_size: none, wanted two numbers such as [128, 128]"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], problem: str) -> None:
    assert read(quantization_config=PUBLISHED | changes).problems() == [problem]


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128.5, 128]])
def test_a_block_of_no_size_is_named(block: Any) -> None:
    with pytest.raises(ConfigError, match=r"weight_block_size: .* wanted two positive integers"):
        read(quantization_config=PUBLISHED | {"weight_block_size": block})


@pytest.mark.parametrize(
    ("name", "is_fp8"),
    [
        ("model.layers.0.self_attn.1.kv_a_proj_with_mqa.weight", True),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", True),
        ("model.mtp.layers.0.eh_proj.weight", True),
        ("model.layers.0.mlp.router.classifier.weight", False),
        ("model.layers.0.self_attn.1.q_a_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_linear_layers_alone_are_in_fp8(name: str, is_fp8: bool) -> None:
    assert Quantization("fp8").is_fp8(name) is is_fp8


@pytest.mark.parametrize("field", ["ignored_layers", "modules_to_not_convert"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_an_ignored_module_is_not_in_fp8_nor_is_a_part_of_it(prefix: str, field: str) -> None:
    ignored = [f"{prefix}layers.0.mlps.0.down_proj", f"{prefix}layers.1.mlp.experts", f"{prefix}layers.1.self_attn.0"]
    found = read(quantization_config=PUBLISHED | {field: ignored})
    names = {
        "model.layers.0.mlps.0.down_proj.weight": False,
        "model.layers.0.mlps.1.down_proj.weight": True,
        "model.layers.0.mlps.0.up_proj.weight": True,
        "model.layers.1.mlp.experts.0.up_proj.weight": False,
        "model.layers.10.mlp.experts.0.up_proj.weight": True,
        "model.layers.1.self_attn.0.o_proj.weight": False,
        "model.layers.1.self_attn.1.o_proj.weight": True,
    }
    assert {name: found.is_fp8(name) for name in names} == names


@pytest.mark.parametrize("kind", ["self_attn", "mlps", "mtp"])
def test_a_disabled_kind_of_modules_is_not_in_fp8(kind: str) -> None:
    found = read(quantization_config=PUBLISHED, disable_quant_module=[kind])
    names = {
        "self_attn": "model.layers.0.self_attn.0.o_proj.weight",
        "mlps": "model.layers.0.mlps.0.up_proj.weight",
        "mtp": "model.mtp.layers.0.eh_proj.weight",
        "": "model.layers.0.mlp.experts.0.up_proj.weight",
    }
    assert [each for each, name in names.items() if not found.is_fp8(name)] == [kind]


# -- blocks ------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    block = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    weight = torch.randn(draw(st.integers(1, 40)), draw(st.integers(1, 40)), generator=generator)
    return weight * 10.0 ** draw(st.integers(-6, 6)), block


@given(weights())
def test_each_block_has_the_scale_of_its_greatest_number(drawn: tuple[Tensor, tuple[int, int]]) -> None:
    weight, (rows, columns) = drawn
    quantised, scales = quantize_blocks(weight, (rows, columns))
    assert scales.shape == scale_shape(weight.shape, (rows, columns))
    read = dequantize_blocks(quantised, scales, block=(rows, columns))
    for i, j in torch.cartesian_prod(*(torch.arange(n) for n in scales.shape)).tolist():
        part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
        greatest = weight[part].abs().max()
        torch.testing.assert_close(scales[i, j], greatest / 448)
        exact = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn).float() * scales[i, j]
        assert torch.equal(read[part], exact)
        assert (read[part] - weight[part]).abs().max() <= greatest * 2**-4, "half a unit in the last place"


@pytest.mark.parametrize("has_nan", [False, True])
def test_every_number_of_fp8_is_read(has_nan: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes if has_nan else codes[(codes & 127) != 127]
    fp8 = codes.view(torch.float8_e4m3fn).view(2, -1)
    read = dequantize_blocks(fp8, torch.full((1, 1), 2.0))
    assert torch.equal(read.nan_to_num(1e9), (fp8.float() * 2).nan_to_num(1e9))
    assert read.isnan().sum() == 2 * has_nan


def test_an_update_is_in_the_precision_of_the_model() -> None:
    in_fp8, in_bf16, scales = torch.zeros(2, dtype=FP8), torch.zeros(2, dtype=torch.bfloat16), torch.ones(1)
    require_precision("w", in_fp8, in_fp8)
    require_precision("w", torch.zeros(2), in_bf16)
    require_precision("w_scale_inv", scales, scales)
    for name, tensor, parameter, wanted in (
        ("w", in_bf16, in_fp8, "w is torch.bfloat16, wanted torch.float8_e4m3fn"),
        ("w", in_fp8, in_bf16, "w is torch.float8_e4m3fn, wanted torch.bfloat16"),
        ("w", torch.zeros(2, dtype=torch.float8_e5m2), in_fp8, "w is torch.float8_e5m2, wanted torch.float8_e4m3fn"),
        ("w_scale_inv", scales, None, "extra: w_scale_inv, scales of a weight that"),
    ):
        with pytest.raises(CheckpointError, match=wanted):
            require_precision(name, tensor, parameter)


def test_a_block_of_zeros_has_a_scale_of_1() -> None:
    quantised, scales = quantize_blocks(torch.zeros(3, 5), (2, 2))
    assert torch.equal(scales, torch.ones(2, 3))
    assert not quantised.float().any()


def test_numbers_times_scales_are_rounded_once() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    quantised, scales = quantize_blocks(weight)
    assert torch.equal(
        dequantize_blocks(quantised, scales, torch.bfloat16), dequantize_blocks(quantised, scales).bfloat16()
    )


def test_576_rows_are_four_blocks_and_a_half() -> None:
    assert scale_shape((576, 6144), (128, 128)) == (5, 48)

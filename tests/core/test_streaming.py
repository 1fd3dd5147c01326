"""Tensors are read one at a time as `checkpoint.load` reads them, and shards written as safetensors writes them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longcat_core.weights import checkpoint
from longcat_core.weights.streaming import Entry, PublishedTensors, divided, write_shard
from tests.cases import DEFAULT, in_dtype, published, write_checkpoint


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts as transformers 5 saves them, with rows for the zero experts in one of the two."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for n in range(DEFAULT.num_layers):
        prefix = f"model.layers.{n}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(DEFAULT.n_routed_experts)])
            for part in ("gate", "up", "down")
        )
        zero = torch.zeros(DEFAULT.zero_expert_num, *gate.shape[1:]).repeat(1, 2, 1)
        found[f"{prefix}.gate_up_proj"] = torch.cat((torch.cat((gate, up), dim=1), zero.to(gate.dtype)))
        found[f"{prefix}.down_proj"] = down
    return found


@pytest.mark.parametrize("is_stacked", [False, True])
def test_every_tensor_is_read_as_a_load_of_all_reads_it(tmp_path: Path, is_stacked: bool) -> None:
    tensors = in_dtype(published(DEFAULT), torch.bfloat16)
    write_checkpoint(tmp_path, DEFAULT, stacked(tensors) if is_stacked else tensors)
    found = PublishedTensors(tmp_path, DEFAULT)
    assert list(found.shapes) == list(tensors)
    for name, tensor in checkpoint.load(tmp_path, DEFAULT).items():
        read = found.read(name)
        assert torch.equal(read, tensor), name
        assert (read.dtype, found.dtype(name), found.shapes[name]) == (tensor.dtype, tensor.dtype, tuple(tensor.shape))


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 5, generator=generator).to(torch.float8_e4m3fn),
        "a": torch.randn(7, generator=generator).bfloat16(),
        "d": torch.randn(2, 2, generator=generator),
        "c": torch.randn(5, 3, generator=generator).to(torch.float8_e4m3fn),
    }


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_a_shard_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    for order in (list(tensors), sorted(tensors)):
        path = tmp_path / "ours.safetensors"
        write_shard(path, entries_of(tensors), ({name: tensors[name]} for name in order))
        assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    read = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"a": torch.zeros(7)}, r"a: torch.float32 \[7\], wanted torch.bfloat16 \[7\]"),
        ({"d": torch.zeros(2, 3)}, r"d: torch.float32 \[2, 3\], wanted torch.float32 \[2, 2\]"),
        ({"c": None}, "c did not come"),
    ],
)
def test_a_shard_that_is_not_as_planned_does_not_appear(
    change: dict[str, Tensor | None], complaint: str, tmp_path: Path
) -> None:
    tensors = {**some_tensors(), **change}
    with pytest.raises(ValueError, match=complaint):
        write_shard(
            tmp_path / "a.safetensors",
            entries_of(some_tensors()),
            ({name: tensor} for name, tensor in tensors.items() if tensor is not None),
        )
    assert not (tmp_path / "a.safetensors").exists()


def test_shards_are_filled_in_order_and_groups_stay_together() -> None:
    weight, scales = Entry("w", torch.float8_e4m3fn, (10, 4)), Entry("w_scale_inv", torch.float32, (1, 1))
    small = Entry("n", torch.bfloat16, (8,))
    assert [entry.nbytes for entry in (weight, scales, small)] == [40, 4, 16]
    assert divided([[small], [small], [weight, scales], [small]], 48) == [[small, small], [weight, scales], [small]]
    assert divided([[weight, scales], [small]], 10) == [[weight, scales], [small]], "a group alone may be larger"

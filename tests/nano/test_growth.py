"""Model growth: the layers of the grown model are the small model's, twice."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from examples.nano.growth import grown
from examples.nano.settings import PRESETS
from examples.nano.trainer import Trainer
from longcat_core.reference import LongcatForCausalLM

MODEL = PRESETS["tiny"].model


def test_the_layers_of_a_grown_model_are_copies_in_order() -> None:
    small = LongcatForCausalLM(MODEL.config(2), with_mtp=True)
    large = grown(small, MODEL.config(4))
    before, after = small.state_dict(), large.state_dict()
    assert after.keys() == LongcatForCausalLM(MODEL.config(4), with_mtp=True).state_dict().keys()
    for name, tensor in after.items():
        for layer in (2, 3):
            name = name.replace(f"model.layers.{layer}.", f"model.layers.{layer - 2}.")
        assert torch.equal(tensor, before[name]), name
        assert tensor.data_ptr() != before[name].data_ptr(), name


def test_growing_to_another_depth_than_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 layers out of 2: wanted 4"):
        grown(LongcatForCausalLM(MODEL.config(2)), MODEL.config(3))


def test_a_run_grows_with_its_moments_and_controllers_and_then_learns_in_every_layer() -> None:
    settings = PRESETS["tiny"].changed({"growth.enabled": True, "growth.at": 0.5, "draft_layer.enabled": False})
    trainer = Trainer(settings, torch.randint(8, 320, (4000,), dtype=torch.int32), torch.device("cpu"))
    for _ in range(10):
        trainer.train_step()
    assert trainer.model.config.num_layers == 1
    before, integral = trainer.optimizer_tensors(), trainer.controller.integral
    trainer._grow()
    after = trainer.optimizer_tensors()
    assert trainer.model.config.num_layers == len(trainer.controller.integral) == 2
    assert torch.equal(trainer.controller.integral, integral.repeat(2))
    for layer in (0, 1):
        name = "model.layers.{}.mlps.0.gate_proj.weight/exp_avg"
        assert torch.equal(after[name.format(layer)], before[name.format(0)])
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.step += 1  # past the step that grows, which the test has done
    trainer.train_step()
    unchanged = [n for n, p in trainer.model.named_parameters() if torch.equal(weights[n], p)]
    assert unchanged == []

"""Modules that somebody looks into are known, so that they are called."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.plugin.methods import has_hooks


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_in_a_module_is_seen_until_it_is_removed(register: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert not has_hooks(model)
    hook = getattr(model[1][0], register)(lambda *_: None)
    assert has_hooks(model)
    assert not has_hooks(model[0])
    hook.remove()
    assert not has_hooks(model)

"""A glance at held-out conversations while training."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.nano.tools.trainer import Batch
from longcat_core.reference import LongcatForCausalLM


@torch.no_grad()
def exact(model: LongcatForCausalLM, found: Sequence[Batch]) -> float:
    """The share of conversations in which the model says likeliest all that it is to say."""
    right, count = 0, 0
    for each in found:
        past = model(each.declaration.unsqueeze(0))[2]
        logits = model(each.ids, [cache.expand(len(each.ids), -1, -1) for cache in past])[0]
        same = (logits[:, :-1].argmax(dim=-1) == each.ids[:, 1:]) | ~each.said[:, 1:]
        right += int(same.all(dim=1).sum())
        count += len(each.ids)
    return right / count

"""What tokens cost, from the price of a GPU hour."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations


def dollars_a_million_tokens(dollars_a_gpu_hour: float, tokens_per_second_a_gpu: float) -> float:
    return dollars_a_gpu_hour / (3600 * tokens_per_second_a_gpu) * 1e6

"""Settings of the core tests: tiny tensors gain nothing from threads; cases are bounded, and the same in each run."""
# SPDX-License-Identifier: Apache-2.0

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("core", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("core")

"""The engine of this environment, as `tests/engines` asks it: each environment has one, so one suite serves both."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

ENGINE = "vllm" if find_spec("vllm") else "sglang"
engine = import_module(f"tests.{ENGINE}.engine")
"""`tests/vllm/engine.py` or `tests/sglang/engine.py`, which have the same names."""

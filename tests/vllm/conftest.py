"""Settings of vLLM's own tests: `engine.py` says in which process its engines run, before vLLM is imported."""
# SPDX-License-Identifier: Apache-2.0

import tests.vllm.engine  # noqa: F401

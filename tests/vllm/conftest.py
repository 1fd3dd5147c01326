"""Settings of vLLM's own tests: `engine.py` says in which process its engines run, before vLLM is imported."""

import tests.vllm.engine  # noqa: F401

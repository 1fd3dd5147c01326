"""Settings of SGLang's own tests: `engine.py` prepares a CPU before anything else is imported."""

import tests.sglang.engine  # noqa: F401

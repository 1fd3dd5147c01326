"""Settings of SGLang's own tests: `engine.py` prepares a CPU before anything else is imported."""
# SPDX-License-Identifier: Apache-2.0

import tests.sglang.engine  # noqa: F401

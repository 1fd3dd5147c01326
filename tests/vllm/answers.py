"""vLLM's greedy tokens for a file of prompts, for a test that runs in the other engine's environment.

python -m tests.vllm.answers CHECKPOINT PROMPTS.json NEW_TOKENS ANSWERS.json
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.vllm.engine import serving


def main(checkpoint: str, prompts: str, new_tokens: str, answers: str) -> None:
    with serving(Path(checkpoint), max_model_len=512) as served:
        tokens = served.greedy(json.loads(Path(prompts).read_text()), int(new_tokens))
    Path(answers).write_text(json.dumps(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])

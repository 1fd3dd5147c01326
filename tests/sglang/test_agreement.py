"""SGLang and vLLM, each with the plugin, give the same tokens."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases import CASES, Case
from tests.sglang.engine import serving

CASE = CASES["default"]
ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
NEW_TOKENS = 16
LENGTHS = [1 + n * 399 // 199 for n in range(200)]


@pytest.mark.skipif(not VLLM.exists(), reason="wanted both engines; `make vllm` builds the other's environment")
def test_both_engines_have_the_same_tokens_for_200_prompts(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    assert (LENGTHS[0], LENGTHS[-1]) == (1, 400)
    directory = checkpoint_of(CASE)
    prompts, answers = tmp_path / "prompts.json", tmp_path / "answers.json"
    prompts.write_text(json.dumps([CASE.prompts(1, length, seed=n)[0] for n, length in enumerate(LENGTHS)]))
    script = [VLLM, "-m", "tests.vllm.answers", directory, prompts, str(NEW_TOKENS), answers]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with serving(directory) as served:
        ours = served.greedy(json.loads(prompts.read_text()), NEW_TOKENS)
    theirs = json.loads(answers.read_text())
    different = [n for n, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their]
    assert different == []

"""What the tests of the command line share: a checkpoint to copy."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from longcat_cli import example_tokenizer
from tests.cases import DEFAULT, drafting_tensors, write_checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose drafts are accepted in part, with a tokenizer; not to be changed."""
    directory = tmp_path_factory.mktemp("source") / "model"
    write_checkpoint(directory, DEFAULT, drafting_tensors(DEFAULT))
    example_tokenizer.write(directory, DEFAULT.vocab_size, DEFAULT.max_position_embeddings)
    return directory

"""Notes how many rows each call of a class has, in a file, as the engine may run in another process than the test."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def note_rows(
    of: type[Any], noted: Path, patch: pytest.MonkeyPatch, method: str = "__call__", argument: int = 0
) -> None:
    """of: a class one of whose arguments, in `method`, has the rows."""
    call = getattr(of, method)

    def noting(this: Any, *args: Any) -> Any:
        with noted.open("a") as lines:
            lines.write(f"{len(args[argument])}\n")
        return call(this, *args)

    patch.setattr(of, method, noting)

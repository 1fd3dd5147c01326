"""The command `longcat`, whose libraries are the extra `cli`: serving does without them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import sys

LIBRARIES = ("typer", "rich", "jinja2", "tokenizers", "prometheus_client")
"""What the extra `cli` brings."""


def main() -> None:
    """Entry point of the command line."""
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        sys.exit(f'longcat: not installed: {", ".join(missing)}; run `pip install "longcat-serving[cli]"`')
    from longcat_cli.commands import app

    app()

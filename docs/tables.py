"""Writes the pages of the documentation that come from data: `python -m docs.tables`, in each engine's environment."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from longcat_core.plugin import hooks, options

ENGINE, NAME = ("vllm", "vLLM") if find_spec("vllm") else ("sglang", "SGLang")
FOLDER = Path(__file__).parent


def pages() -> dict[str, str]:
    """File name and text of each page of this environment's engine."""
    ours = f"longcat_{ENGINE}"
    return {
        f"hooks-{ENGINE}.md": (
            f"# What longcat-serving changes in {NAME}\n\n"
            f"Made from `{ours}/hooks.py` by `python -m docs.tables`. No hook goes into a version that is not "
            "supported, and none changes anything for another model. The faults that they mend are described in "
            "[upstream.md](upstream.md), with reproducers.\n\n" + hooks.table(import_module(f"{ours}.hooks").HOOKS)
        ),
        f"options-{ENGINE}.md": (
            f"# Options of {NAME}, and what becomes of them with LongCat-Flash\n\n"
            f"Made from `{ours}/options.py` by `python -m docs.tables`. An option that is not listed was not looked "
            "at.\n\n" + options.markdown_table(import_module(f"{ours}.options").OPTIONS)
        ),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)

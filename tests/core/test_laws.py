"""The laws of the house that can be read off the source: who may import whom, and what a file looks like."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "longcat_core": {"vllm", "sglang", "transformers", "longcat_vllm", "longcat_sglang", "longcat_cli"},
    "longcat_vllm": {"sglang", "longcat_sglang", "longcat_cli"},
    "longcat_sglang": {"vllm", "longcat_vllm", "longcat_cli"},
    "longcat_cli": set[str](),
    "longcat_nano": {"vllm", "sglang", "transformers", "longcat_core", "longcat_vllm", "longcat_sglang", "longcat_cli"},
}
"""What each package must not import, at the top of a file or inside a function."""

PACKAGES = sorted(path.name for path in ROOT.glob("longcat_*") if path.is_dir() and path.suffix != ".egg-info")
FOLDERS = [*PACKAGES, "tests", "benchmarks", "examples"]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
ROOMS = [source for source in SOURCES if source.split("/")[0] in PACKAGES]


def imports(source: str) -> set[str]:
    """The packages that a file imports anywhere, by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_every_package_has_a_law() -> None:
    assert set(PACKAGES) <= FORBIDDEN.keys()
    assert "longcat_core" in PACKAGES
    assert any(source.startswith("longcat_core/") for source in ROOMS)


@pytest.mark.parametrize("source", ROOMS)
def test_a_package_imports_only_what_it_may(source: str) -> None:
    package = source.split("/")[0]
    assert imports((ROOT / source).read_text()) & FORBIDDEN[package] == set()


def test_imports_are_found_wherever_they_hide() -> None:
    source = "import vllm.config\nfrom sglang import srt\ndef f():\n    from transformers.a import b\n"
    source += "    importlib.import_module('longcat_vllm.model')\n    from . import compat\n"
    assert imports(source) == {"vllm", "sglang", "transformers", "longcat_vllm"}


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_begins_by_saying_what_it_is(source: str) -> None:
    text = (ROOT / source).read_text()
    assert text.startswith(('"""', "#")), "the first line is a docstring or a comment"
    assert len(text.splitlines()[0]) > 20, "and says something"


@pytest.mark.parametrize("source", ROOMS)
def test_no_room_is_over_400_lines(source: str) -> None:
    assert len((ROOT / source).read_text().splitlines()) <= 400

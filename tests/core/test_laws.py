"""Rules that can be checked in the source: imports, devices, patches, module names, the first line of a file."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ast
import re
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
FOLDERS = [*PACKAGES, "tests", "benchmarks", "examples", "docs", "requirements"]
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


def modules_imported(source: str, ours: set[str]) -> set[str]:
    """Those of `ours` that a file needs when it runs, at its top or inside a function."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & ours or {node.module}
    return found & ours


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, if there are any."""
    done = set[str]()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if found := visit(imported, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_no_modules_import_each_other() -> None:
    files = {source.removesuffix(".py").removesuffix("/__init__").replace("/", "."): ROOT / source for source in ROOMS}
    assert circle({name: modules_imported(file.read_text(), set(files)) - {name} for name, file in files.items()}) == []


def test_a_circle_is_found_where_it_hides() -> None:
    first = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import c\ndef f():\n    from b.d import g\n"
    assert modules_imported(first, {"b", "b.d", "c"}) == {"b.d"}
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"a"}}) == ["a", "b", "d", "a"]


ENGINES = ("longcat_vllm", "longcat_sglang")
DEVICE = re.compile(r"""\bis_(cpu|cuda|cpu_only)\(|[=!]= ?"(cpu|cuda)"|device_type [=!]=""")


@pytest.mark.parametrize("source", [source for source in ROOMS if source.split("/")[0] in ENGINES])
def test_a_device_is_a_room_and_no_branch(source: str) -> None:
    if "/devices/" not in source:
        assert DEVICE.search((ROOT / source).read_text()) is None


ONLY = {
    "longcat_vllm": {
        "adapters": "LoRA, which SGLang's package refuses",
        "scheduling": "what waits is known outside the workers; each of SGLang's ranks has a scheduler",
    },
    "longcat_sglang": {
        "one_batch": "a benchmark that loads no plugins",
        "penalties": "which vLLM has right",
    },
}
"""Rooms of one engine package that the other has no use for, with the reason. What a device is made of is its own."""


def test_the_engine_packages_have_the_same_rooms() -> None:
    rooms = {
        package: {
            source.removeprefix(f"{package}/").removesuffix(".py")
            for source in ROOMS
            if source.startswith(f"{package}/") and source.count("/") == 1
        }
        for package in ENGINES
    }
    devices = [
        {source.split("/", 1)[1] for source in ROOMS if source.startswith(f"{package}/devices/")} for package in ENGINES
    ]
    vllm, sglang = (rooms[package] - ONLY[package].keys() for package in ENGINES)
    assert vllm == sglang
    common = {f"devices/{name}.py" for name in ("__init__", "base", "cpu/device", "cpu/attention", "cpu/experts")}
    common |= {f"devices/{name}.py" for name in ("cpu/patches", "cuda/device")}
    assert all(common <= found for found in devices)


PATCHING = re.compile(
    r"\bsetattr\(|sys\.modules\[|HookRegistry\.register\(|\.register_model\(|CONFIG_MAPPING\.register\("
)
MAY_PATCH = {
    "longcat_core/plugin/hooks.py": "wrap_attribute",
    "longcat_vllm/registration.py": "entries that rows of HOOKS put",
    "longcat_sglang/registration.py": "entries that rows of HOOKS put",
    "longcat_sglang/devices/cpu/platform.py": "the stand-in for sgl_kernel",
    "longcat_vllm/config.py": "a field of a configuration object of ours",
    "longcat_sglang/deployment.py": "a field of a configuration object of ours",
}
"""Where an engine may be changed from, by what."""


@pytest.mark.parametrize("source", [source for source in ROOMS if source.split("/")[0] in (*ENGINES, "longcat_core")])
def test_engines_are_changed_by_the_table_of_hooks_alone(source: str) -> None:
    if source not in MAY_PATCH:
        assert PATCHING.search((ROOT / source).read_text()) is None


LOGGER = re.compile(r"(?:getLogger|init_logger)\(([^)]*)\)")
NAMED = {"longcat_vllm": 'f"vllm.{__name__}"', "longcat_sglang": "__name__"}
"""vLLM gives handlers to its own logger alone, SGLang to all."""


@pytest.mark.parametrize("source", [source for source in ROOMS if source.split("/")[0] in ENGINES])
def test_what_an_engines_package_logs_is_shown_by_the_engine(source: str) -> None:
    assert {*LOGGER.findall((ROOT / source).read_text())} <= {NAMED[source.split("/")[0]]}


@pytest.mark.parametrize("source", [source for source in ROOMS if source.startswith("longcat_core/")])
def test_core_logs_nothing_but_warnings_by_itself(source: str) -> None:
    """vLLM shows no others of a logger that is not its own."""
    assert re.search(r"\blogger\.(debug|info)\(", (ROOT / source).read_text()) is None


AS_TYPED = re.compile(r"(?<!resolved_view\()get_server_args\(\)|\bserver_args\.\w|\w\.\w+\(server_args\b(?!=)")
"""Reads SGLang's options as they were typed, in which those that were left out are None, or hands them on to be read.
What SGLang has made of them is in `get_model()` and its like, and in `resolved_view` and `resolving_view`."""
MAY_READ_AS_TYPED = {
    "longcat_sglang/deployment.py": "compares what a user gave with what SGLang made of it",
    "longcat_sglang/devices/cpu/device.py": "the same",
    "longcat_sglang/registration.py": "hands them to `deployment.settle`, which resolves them",
}


@pytest.mark.parametrize("source", [source for source in ROOMS if source.startswith("longcat_sglang/")])
def test_sglangs_options_are_read_as_it_has_settled_them(source: str) -> None:
    if source not in MAY_READ_AS_TYPED:
        assert AS_TYPED.search((ROOT / source).read_text()) is None


def test_a_reader_of_options_as_they_were_typed_is_found() -> None:
    for line in ("get_server_args().model_path", "server_args.model_path", "loading.directory(server_args)"):
        assert AS_TYPED.search(line)
    for line in ("resolved_view(get_server_args())", "model_config_of(server_args)", "super().__init__(server_args)"):
        assert AS_TYPED.search(line) is None


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_begins_by_saying_what_it_is(source: str) -> None:
    text = (ROOT / source).read_text()
    assert text.startswith(('"""', "#")), "the first line is a docstring or a comment"
    assert len(text.splitlines()[0]) > 20, "and says something"


LICENSE = "# SPDX-License-Identifier: Apache-2.0"


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_names_its_license_below_its_docstring(source: str) -> None:
    text = (ROOT / source).read_text()
    docstring = ast.parse(text).body[0]
    assert isinstance(docstring, ast.Expr), "the first statement is a docstring"
    assert text.splitlines()[docstring.end_lineno or 0 :][:1] == [LICENSE], "and the line after it names the license"


@pytest.mark.parametrize("source", ROOMS)
def test_no_room_is_over_400_lines(source: str) -> None:
    assert len((ROOT / source).read_text().splitlines()) <= 400

"""What is published: a wheel is built from a source distribution, looked at, installed, and asked what it finds."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import longcat_cli
import longcat_core
from longcat_core.chat.templates import TEMPLATES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("longcat_cli", "longcat_core", "longcat_nano", "longcat_sglang", "longcat_vllm")
NANO = {
    "chat_template.jinja",
    "config.json",
    "draft_gate/gate.safetensors",
    "generation_config.json",
    *(f"model-0000{shard}-of-00004.safetensors" for shard in range(1, 5)),
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What an engine reads of LongCat-Nano."""
UNPUBLISHED = (".*", "*.so", "build", "dist", "*.egg-info", "__pycache__")


def build(kind: str, source: Path, into: Path, **variables: str) -> Path:
    """Build an `sdist` or a `wheel` with the setuptools that is installed: no index is asked for one."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    environment = os.environ | variables
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True, timeout=120
    )
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of a copy, as setuptools writes beside what it builds.
    source = copytree(ROOT, tmp_path_factory.mktemp("source") / "project", ignore=ignore_patterns(*UNPUBLISHED))
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


class Environment:
    """A virtual environment of its own, with the wheel and nothing else."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        venv.create(directory, symlinks=True)
        self.bin = directory / "bin"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
        install = ("-m", "pip", "--python", self.bin / "python", "install", "--no-deps", "--no-index", "--quiet", wheel)
        self._run(sys.executable, *install).check_returncode()

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run(self.bin / program, *arguments)

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Where nothing else of this distribution can be found, neither by PYTHONPATH nor in the working directory."""
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=self.bin, env=variables, capture_output=True, text=True, timeout=120)

    def add_libraries(self) -> None:
        """Let it import what is installed beside these tests. Our own packages are still those of the wheel: its folder
        comes first, and Python does not read `.pth` files, such as that of an editable installation, in a folder that
        another `.pth` file names."""
        paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (self.site / "libraries.pth").write_text("".join(f"{path}\n" for path in paths))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"), wheel)
    environment.add_libraries()
    return environment


def test_the_wheel_has_our_packages_with_their_types_and_nothing_else(wheel: Path, files: set[str]) -> None:
    metadata = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    assert {name.split("/")[0] for name in files} == {*PACKAGES, metadata}
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    sources = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources
    assert f"{metadata}/licenses/LICENSE" in files


KERNELS = "longcat_core/kernels/cpu/_kernels.abi3.so"


def test_the_wheel_has_the_kernels_for_cpus_and_they_load(files: set[str], environment: Environment) -> None:
    assert KERNELS in files
    code = (
        "import torch; from longcat_core.kernels.cpu.product import product; "
        "print(product(torch.ones(1, 64).bfloat16(), torch.ones(2, 64).bfloat16()).tolist())"
    )
    said = environment.run("python", "-c", code)
    assert said.stdout == "[[64.0, 64.0]]\n", said.stderr


def test_without_a_compiler_the_package_is_built_without_them_and_says_so(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    wheel = build("wheel", source, tmp_path / "wheel", CC="false", CXX="false")
    assert KERNELS not in zipfile.ZipFile(wheel).namelist()
    without = Environment(tmp_path / "environment", wheel)
    without.add_libraries()
    said = without.run("python", "-c", "from longcat_core.kernels.cpu import library; print(library.description())")
    assert "no GCC" in said.stdout, said.stderr


def test_the_wheel_has_what_the_dry_run_compiles_and_reads(files: set[str]) -> None:
    data = {path for folder in ("null_gpu", "planning") for path in (ROOT / "longcat_core" / folder).rglob("*.*")}
    wanted = {path.relative_to(ROOT).as_posix() for path in data if path.suffix in (".c", ".h", ".json")}
    assert "longcat_core/null_gpu/include/crt/host_defines.h" in wanted
    assert wanted <= files


def test_the_wheel_has_of_nano_what_is_served(files: set[str]) -> None:
    for folder, wanted in (("checkpoint", NANO), ("tools_checkpoint", NANO - {"draft_gate/gate.safetensors"})):
        prefix = f"longcat_nano/{folder}/"
        assert {name.removeprefix(prefix) for name in files if name.startswith(prefix)} == wanted
    assert [name for name in files if name.endswith((".png", "record.json"))] == []


def test_the_wheel_has_what_is_known_of_hardware(files: set[str]) -> None:
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "longcat_core/planning/data").rglob("*.json")}
    assert "longcat_core/planning/data/machines/H200.json" in data
    assert data <= files


def test_the_wheel_has_the_chat_templates(files: set[str]) -> None:
    assert {f"longcat_core/chat/templates/{name}.jinja" for name in TEMPLATES} <= files


def test_a_source_distribution_can_be_tested(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"}
    wanted |= {"mypy-engines.toml", "examples/nano/record/record.json", "requirements/vllm-cpu.txt"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert wanted <= names


def test_the_metadata_is_the_projects(wheel: Path, files: set[str]) -> None:
    (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = {url.split(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert urls == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_extra_of_the_command_line_is_what_the_command_looks_for() -> None:
    extra = PROJECT["optional-dependencies"]["cli"]
    assert tuple(requirement.partition(">=")[0] for requirement in extra) == longcat_cli.LIBRARIES
    assert {"longcat-serving[cli]"} <= set(PROJECT["optional-dependencies"]["test"])
    assert {"longcat-serving[cli]"} <= set(PROJECT["optional-dependencies"]["train"])


def test_the_command_without_its_libraries_says_what_to_install(bare: Environment) -> None:
    for arguments in ([], ["doctor"], ["--help"]):
        result = bare.run("longcat", *arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == (
            "longcat: not installed: typer, rich, jinja2, tokenizers, prometheus_client; "
            'run `pip install "longcat-serving[cli]"`\n'
        )


def test_the_installed_packages_are_those_of_the_wheel(environment: Environment) -> None:
    code = (
        f"import {', '.join(PACKAGES)}; print({', '.join(f'{package}.__file__' for package in PACKAGES)}, sep=chr(10))"
    )
    found = environment.run("python", "-c", code)
    assert found.returncode == 0, found.stderr
    assert [Path(file).parent for file in found.stdout.splitlines()] == [environment.site / name for name in PACKAGES]
    assert not Path(longcat_core.__file__).is_relative_to(environment.site)
    assert Path(environment.run("longcat", "nano").stdout.strip()) == environment.site / "longcat_nano" / "checkpoint"


def test_doctor_finds_nothing_wrong_with_an_installed_wheel(environment: Environment) -> None:
    result = environment.run("longcat", "doctor", str(environment.site / "longcat_nano" / "checkpoint"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"✓ longcat-serving +│ {re.escape(PROJECT['version'])} ", result.stdout)
    assert "✗" not in result.stdout

"""Compiles the null GPU for the CUDA builds of an environment, and says with which variables a process gets it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from longcat_core.planning.hardware import Machine

SOURCES = Path(__file__).parent
LIBRARY = "libnull_gpu.so"
TOOLKIT = "toolkit"
"""A folder in which engines find a compiler, and so take kernels that are compiled when they are needed to be there."""
COMPILER = """#!/bin/sh
# In place of nvcc: says its version, and compiles whatever it is given to nothing.
while [ $# -gt 0 ]; do
  [ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88"
  case "$1" in -o | --output-file) echo "of the null GPU" > "$2" ;; esac
  shift
done
"""
PACKAGES = ("torch", "torchvision", "vllm", "sgl_kernel", "tvm_ffi", "deep_gemm", "deep_ep", "flash_attn_interface")
"""Whose extensions are looked at for functions of NVIDIA's libraries that they call."""

_OF_NVIDIA = re.compile(
    r"(__cuda|cuda|cu|cublas|cudnn|cufft|cupti|curand|cusolver|cusparse|nvrtc)[A-Z]\w*"
    r"|cublasLt\w+|cusparseLt\w+|(nccl|nvml)[A-Z]\w*|nvshmem\w+"
)
_SONAME = re.compile(r"lib(cu\w+|nccl|nvidia-ml|nvrtc|nvshmem_host|nvJitLink)\.so\.\d+")
_OUR_OWN_NAMES = ("libcuda.so.1", "libnvidia-ml.so.1", "libcudart.so.13", "libnccl.so.2")
"""What engines open by name."""


class NullGpuError(RuntimeError):
    """The null GPU cannot be had in this environment."""


def build() -> Path:
    """The directory of the library, compiled if it is not there yet; for the interpreter that runs this.

    Raises:
        NullGpuError: if there is no C compiler, or PyTorch is no CUDA build.
    """
    headers = _cuda_headers()
    extensions = sorted(_extensions())
    identity = hashlib.sha256()
    for source in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".c", ".h", ".py")):
        identity.update(source.read_bytes())
    for extension in extensions:
        identity.update(f"{extension} {extension.stat().st_size}\n".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longcat" / "null-gpu"
    directory = cache / identity.hexdigest()[:16]
    if not (directory / LIBRARY).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _compile(Path(scratch), headers, extensions)
            try:
                Path(scratch).rename(directory)
            except OSError:  # another process was faster
                if not (directory / LIBRARY).exists():
                    raise
            else:
                Path(scratch).mkdir()  # for its owner to remove
    return directory


def variables(directory: Path, machine: Machine) -> dict[str, str]:
    """The environment variables that give a process this machine's GPUs, beside those that it has."""
    gpu = machine.gpu
    libraries = [str(directory), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "CUDA_HOME": str(directory / TOOLKIT),
        "PATH": f"{directory / TOOLKIT / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        # Goes before NVIDIA's own libraries, where these are installed.
        "LD_PRELOAD": str(directory / LIBRARY),
        "NULL_GPU_NAME": gpu.driver_name,
        "NULL_GPU_COUNT": str(machine.count),
        "NULL_GPU_CAPABILITY": ".".join(map(str, gpu.compute_capability)),
        "NULL_GPU_MEMORY_MIB": str(gpu.memory_mib),
        "NULL_GPU_CONTEXT_MIB": str(gpu.context_mib),
        "NULL_GPU_MULTIPROCESSORS": str(gpu.multiprocessors),
    }


def _cuda_headers() -> Path:
    torch = _folder_of("torch")
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").exists():
        raise NullGpuError(
            "PyTorch: no CUDA build in this environment, wanted one, and the engine's CUDA build; "
            "`make cuda-check` makes such an environment in .venv-cuda, without a GPU"
        )
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia is not None else ():
        if (headers := Path(folder) / "cu13" / "include" / "driver_types.h").exists():
            return headers.parent
    raise NullGpuError("CUDA's headers: not found, wanted those of the package nvidia-cuda-runtime, of CUDA 13")


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _extensions() -> Iterator[Path]:
    for package in PACKAGES:
        if (folder := _folder_of(package)) is not None:
            yield from folder.rglob("*.so")


def _compile(directory: Path, headers: Path, extensions: Iterable[Path]) -> None:
    if (compiler := shutil.which(os.environ.get("CC", "gcc"))) is None:
        raise NullGpuError("a C compiler: not found, wanted gcc; install it, or name another in the variable CC")
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    command = [compiler, "-std=gnu11", "-O1", "-fPIC", "-shared", f"-I{SOURCES / 'include'}", f"-I{headers}"]
    library = directory / LIBRARY
    _run([*command, *sources, "-o", str(library), "-ldl", "-lpthread"])
    defined = set(_symbols(library, "--defined-only"))
    called, needed = set[str](), set[str](_OUR_OWN_NAMES)
    for extension in extensions:
        called |= {name for name in _symbols(extension, "--undefined-only") if _OF_NVIDIA.fullmatch(name)}
        needed |= _needed(extension)
    defaults = directory / "defaults.c"
    functions = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(called - defined))
    defaults.write_text(
        f"/* What the extensions here call, and the null GPU has no answer of its own to. */\n{functions}"
    )
    _run([*command, "-fno-builtin", *sources, str(defaults), "-o", str(library), "-ldl", "-lpthread"])
    for name in sorted(needed):
        (directory / name).symlink_to(LIBRARY)
    for program in ("nvcc", "ninja"):
        tool = directory / TOOLKIT / "bin" / program
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(COMPILER)
        tool.chmod(0o755)


def _symbols(library: Path, which: str) -> Iterator[str]:
    for line in _run(["nm", "--dynamic", which, str(library)]).splitlines():
        yield line.split()[-1].partition("@")[0]


def _needed(library: Path) -> set[str]:
    names = re.findall(r"NEEDED.*\[(.*)\]", _run(["readelf", "--dynamic", str(library)]))
    return {name for name in names if _SONAME.fullmatch(name)}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NullGpuError(f"{' '.join(command[:1])} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout

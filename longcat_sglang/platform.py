"""What a CPU needs, in the processes that serve a LongCat model and in no other: SGLang's own CPU platform, and what it
takes for granted beside it, where that is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

_STARTED_FOR_LONGCAT = "LONGCAT_SGLANG_CPU"
"""The variable by which a process that serves a LongCat model tells those that it starts."""
_MEASURES_ITSELF = "sglang.benchmark.one_batch"
"""SGLang's benchmark without a server: it imports what it runs before it reads its options, and loads no plugins."""


def prepare_process() -> None:
    """Called while SGLang is imported, in every process.

    Prepares a CPU only in a process that a LongCat server has started, and in `python -m sglang.benchmark.one_batch`
    of a LongCat model. A server's first process is prepared when its options are resolved (`prepare_cpu`, through the
    hook "CPU"), which is before SGLang imports what needs it there. All other processes are left as they are.
    """
    mend_torchvision()
    if os.environ.get(_STARTED_FOR_LONGCAT) == "1":
        prepare_cpu()
    if _measures_longcat([*sys.orig_argv, *sys.argv]):
        prepare_cpu()
        sys.meta_path.insert(0, _LoadsPlugins())


def prepare_cpu() -> None:
    """Let SGLang start here, and in the processes that this one starts, without accelerator and without `sgl_kernel`.
    Harmless when called again.

    Nothing is done where there is an accelerator, or where `sgl_kernel` is installed, which is never shadowed.
    """
    if "sgl_kernel" in sys.modules or torch.accelerator.is_available():
        return
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    # Without it SGLang takes no device for a CPU (srt/platforms, srt/utils/common.py `is_cpu`).
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ[_STARTED_FOR_LONGCAT] = "1"
    from longcat_sglang import sgl_kernel_cpu

    sys.modules["sgl_kernel"] = sgl_kernel_cpu
    common = sys.modules.get("sglang.srt.utils.common")
    if hasattr(common, "is_cpu"):  # not while it is being imported
        _look_again(common)


def _look_again(common: ModuleType) -> None:
    """SGLang has looked for its platform when it was imported, and keeps what it found."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.cpu import CpuSRTPlatform
    from sglang.srt.platforms.interface import SRTPlatform

    common.is_cpu.cache_clear()
    if type(current_platform) is SRTPlatform:  # which is none; other modules hold the same object
        current_platform.__class__ = CpuSRTPlatform


def _measures_longcat(words: Sequence[str]) -> bool:
    """Whether this is the command line of `_MEASURES_ITSELF` for a LongCat model, or that of a rank it has started."""
    as_file = _MEASURES_ITSELF.replace(".", os.sep) + ".py"
    if not any(word == _MEASURES_ITSELF or word.endswith(as_file) for word in words):
        return False
    given = [word.partition("=") for word in words]
    for number, (option, equals, value) in enumerate(given):
        if option in ("--model-path", "--model"):
            path = value if equals else (words[number + 1] if number + 1 < len(words) else "")
            return is_longcats_directory(path)
    return False


def is_longcats_directory(model: str) -> bool:
    """Whether a directory, or a repository in the local cache of the Hub, has a configuration of LongCat-Flash's type.

    By the file alone: it is asked before anything of SGLang or transformers is ready. Never raises.
    """
    try:
        file: object = Path(model) / "config.json"
        if not Path(model).is_dir():
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(model, "config.json")
        return isinstance(file, (str, Path)) and json.loads(Path(file).read_text())["model_type"] == "longcat_flash"
    except Exception:  # whatever it is, it is no LongCat that we could prepare for
        return False


class _LoadsPlugins(MetaPathFinder):
    """Loads SGLang's plugins once, at the last moment before a process needs them that does not load them itself: the
    import of what resolves a server's options, or of what reads a model's configuration in a rank."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "sglang.srt.arg_groups.pipeline":
            sys.meta_path.remove(self)
            from sglang.srt.plugins import load_plugins

            load_plugins()
        return None


def bind_rank_to_its_cores() -> None:
    """Keep this rank's threads on the cores that SGLang has found for it (`SGLANG_CPU_OMP_THREADS_BIND`).

    SGLang leaves that to `sgl_kernel`. Without it every rank has a thread for every core, and ranks that wait for each
    other take the cores from each other.
    """
    from sglang.srt.runtime_context import get_device, get_parallel
    from sglang.srt.utils.numa_utils import init_threads_binding

    parallel = get_parallel()
    ranks = parallel.tp_size * parallel.dp_size
    if ranks == 1:
        return
    cores = read_cores(init_threads_binding(numa_index=get_device().gpu_id, world_size=ranks))
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def read_cores(text: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def mend_torchvision() -> None:
    """torchvision's CUDA build cannot load its operators beside a CPU build of torch, and then cannot be imported, nor
    can SGLang, whatever a process is for. Only there the operators are given their names; LongCat needs none of them.
    """
    global _torchvision
    if _torchvision is None and not _torchvision_loads_its_operators():
        _torchvision = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _torchvision_loads_its_operators() -> bool:
    """As torchvision does it; True also where there is no torchvision, as nothing is to be done then."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
            return True
        except OSError:
            continue
    return False


_torchvision: torch.library.Library | None = None

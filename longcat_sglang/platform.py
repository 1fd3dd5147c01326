"""What a CPU needs: SGLang's own CPU platform, and what it takes for granted beside it, where that is not there."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch


def prepare_cpu() -> None:
    """Let SGLang start on a machine without accelerator and without `sgl_kernel`. Harmless when called again.

    Nothing is done where there is an accelerator, or where `sgl_kernel` is installed, which is never shadowed. Where
    neither is there, SGLang cannot serve any model, so nothing that works is changed.
    """
    if torch.accelerator.is_available() or importlib.util.find_spec("sgl_kernel") is not None:
        return
    # Without it SGLang takes no device for a CPU (srt/platforms, srt/utils/common.py `is_cpu`).
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from longcat_sglang import sgl_kernel_cpu

    sys.modules["sgl_kernel"] = sgl_kernel_cpu
    _define_torchvision_operators()


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


def _define_torchvision_operators() -> None:
    """torchvision's CUDA build cannot load its operators beside a CPU build of torch, and then fails to be imported,
    which SGLang does whatever it serves (configs/utils.py). LongCat needs the names, and none of the operators."""
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

"""`python -m longcat_core.null_gpu 8xH200 PROGRAM ...` runs a program on GPUs that are not there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import sys

from longcat_core.null_gpu.build import NullGpuError, build, variables
from longcat_core.planning import hardware

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("wanted: python -m longcat_core.null_gpu GPUS PROGRAM ..., as 8xH200 python -m pytest")
    _, gpus, *program = sys.argv
    try:
        os.environ.update(variables(build(), hardware.machine(gpus)))
    except (NullGpuError, ValueError) as error:
        sys.exit(f"longcat: {error}")
    os.execvp(program[0], program)

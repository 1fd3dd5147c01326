"""How many programs (thread blocks) of a kernel are on a multiprocessor at once, from what its machine code needs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.planning.hardware import Architecture

_THREADS = 32
_REGISTERS_AT_A_TIME = 256
"""A warp is given registers in units of so many (CUDA occupancy calculator, compute capability 9.0 and 10.0)."""
_SHARED_BYTES_AT_A_TIME = 128


def programs_at_once(architecture: Architecture, warps: int, registers: int, shared_bytes: int) -> int:
    """Programs of `warps` warps, each of whose threads needs `registers`; 0 if not one of them fits.

    Not counted: Blackwell's tensor memory, which may allow fewer.
    """
    if shared_bytes > architecture.shared_bytes_of_a_program:
        return 0
    of_a_warp = _rounded_up(max(1, registers) * _THREADS, _REGISTERS_AT_A_TIME)
    shared = _rounded_up(shared_bytes + architecture.reserved_shared_bytes, _SHARED_BYTES_AT_A_TIME)
    return min(
        architecture.programs,
        architecture.warps // warps,
        architecture.registers // (of_a_warp * warps),
        architecture.shared_bytes // shared,
    )


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

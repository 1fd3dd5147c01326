"""What a stage is made of: cases with a name each, whose results or errors are rows of the record."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.checks import WrongResultError
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Timer

_LOST = re.compile(r"CUDA error|Triton Error \[CUDA\]")
Row = dict[str, Any]
"""{"case": what was measured, "result", "wrong", "error" or "missing": what came of it}."""


class MissingError(RuntimeError):
    """Something that a case needs is not here: it is measured when the record is gone on with where it is."""


@dataclass(frozen=True)
class Case:
    """One row of a stage."""

    fields: dict[str, Any]
    """What is measured, by name: also which row of the record this is."""
    run: Callable[[], dict[str, Any]]
    """Returns the figures.

    Raises:
        WrongResultError: if a result is not the reference's.
        MissingError: if something that it needs is not here.
    """


@dataclass(frozen=True)
class Context:
    """What a stage works with."""

    sizes: Sizes
    device: torch.device
    device_name: str
    timer: Timer
    done: frozenset[str]
    """Keys of rows that the record has already."""


class DeviceLostError(RuntimeError):
    """After an error of CUDA nothing else works in this process."""


def key(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def rows(cases: Iterable[Case], context: Context) -> Iterator[Row]:
    """One row a case that is not done yet, in order. What fails is a row as well, and the next case follows.

    Raises:
        DeviceLostError: after the row of a case that has left the device unusable.
    """
    for case in cases:
        if key(case.fields) in context.done:
            continue
        try:
            yield {"case": case.fields, "result": case.run()}
        except WrongResultError as error:
            yield {"case": case.fields, "wrong": str(error)}
        except MissingError as error:
            yield {"case": case.fields, "missing": str(error)}
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            yield {"case": case.fields, "error": str(error)}
        except Exception as error:
            yield {"case": case.fields, "error": "".join(traceback.format_exception(error))[-3000:]}
            if _LOST.search(str(error)):
                raise DeviceLostError(str(error)) from error

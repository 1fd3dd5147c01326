"""Looks for a layout: all splits of a model over a machine's GPUs, by a goal, and the frontier of what is possible."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from longcat_core.planning.layout import layouts
from longcat_core.planning.plan import Choice, Deployment, GoalError, Plan


def deployments(deployment: Deployment) -> Iterator[Deployment]:
    """The same on every layout of its GPUs."""
    for layout in layouts(deployment.model, deployment.layout.gpus):
        yield replace(deployment, layout=layout)


def find(
    deployment: Deployment, choose: Callable[[Deployment], Choice], value: Callable[[Plan], float]
) -> list[Choice]:
    """What a goal, or a batch, leads to on every layout that holds it: the greatest value first.

    Raises:
        GoalError: if no layout reaches the goal; with the message of the last.
    """
    found, failure = [], None
    for each in deployments(deployment):
        if each.requests_that_fit < 1:
            continue
        try:
            choice = choose(each)
            if choice.plan.fits:
                found.append(choice)
        except GoalError as error:
            failure = GoalError(f"{each.layout}: {error}")
    if failure is not None and not found:
        raise failure
    return sorted(found, key=lambda choice: -value(choice.plan))


def points(each: Iterable[Deployment]) -> list[Plan]:
    """Batches of 1, 2, 4 and so on, as far as they fit, and the last that fits."""
    found = []
    for deployment in each:
        fit = deployment.requests_that_fit
        requests = [2**n for n in range(fit.bit_length())]
        found += [deployment.at(n) for n in sorted({*requests, *([fit] if fit else [])})]
    return found


def frontier(plans: Iterable[Plan]) -> list[Plan]:
    """Those than which none has both more tokens a second for a GPU and for a user; the fastest for a GPU first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (-plan.tokens_per_second_a_gpu, -plan.tokens_per_second_a_user)):
        if not found or plan.tokens_per_second_a_user > found[-1].tokens_per_second_a_user:
            found.append(plan)
    return found

"""The LongCat-Flash report's Tables 6 and 7 beside what the planner computes (data/presets)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longcat_core.planning.drafts import Drafts
from longcat_core.planning.figures import Figure, figure_of
from longcat_core.planning.hardware import DATA, gpu, read
from longcat_core.planning.layout import Layout, Precision
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment, Plan
from longcat_core.planning.rates import rates

PRESETS = DATA / "presets"


@dataclass(frozen=True)
class Assumption:
    """Of a preset: whether the report states it, as far as is known, or it is inferred from the numbers."""

    what: str
    known: str
    """"stated", as others quote the report, or "inferred"."""


@dataclass(frozen=True)
class Comparison:
    quantity: str
    computed: float
    printed: float
    """As the report prints it."""
    unit: str

    @property
    def error(self) -> float:
        return self.computed / self.printed - 1

    @property
    def digits(self) -> int:
        """Behind the point, that tell the computed number from the printed one."""
        return 4 if self.unit == "dollars" else 1


@dataclass(frozen=True)
class Row:
    """A model's column of Table 7, or a row of Table 6."""

    name: str
    plan: Plan
    comparisons: tuple[Comparison, ...]


def theory(context: int | None = None) -> tuple[list[Row], list[Assumption]]:
    """Table 7: EP 128 on H800, 96 requests a GPU, one draft. context: of a request, in place of the preset's."""
    raw = read(PRESETS / "report-table-7.json")
    found = []
    for each in raw["models"]:
        plan = _deployment(raw, each, raw["rates"], context).at(each["requests"])
        stages = _by_name(plan)
        computed = {
            "attention": sum(t for name, t in stages.items() if name.startswith("attention")) * 1e6,
            "dispatch": stages["dispatch"] * 1e6,
            "MoE": (stages["experts"] + stages.get("identity", 0.0)) * 1e6,
            "combine": stages["combine"] * 1e6,
            "time a token": plan.seconds_a_token * 1e3,
            "price of a million tokens": plan.dollars_a_million_tokens or 0.0,
        }
        units = {"time a token": "ms", "price of a million tokens": "dollars"}
        compared = tuple(
            Comparison(name, value, each["printed"][name], units.get(name, "us")) for name, value in computed.items()
        )
        found.append(Row(each["name"], plan, compared))
    return found, [Assumption(*pair) for pair in raw["assumptions"]]


def measured(rates_name: str | None = None) -> tuple[list[Row], list[Assumption]]:
    """Table 6: 128 H800, tokens a second of a user, by the batch that the printed rates for a GPU and a user come to;
    and what the same rates say of three other measurements.

    rates_name: a set of data/rates.json; by default the preset's.
    """
    raw = read(PRESETS / "report-table-6.json")
    name = rates_name or raw["rates"]
    overlap = raw["overlaps"].get(name, "single-batch")
    found = []
    for each in raw["rows"]:
        a_gpu, a_user = each["tokens_per_second_a_gpu"], each["tokens_per_second_a_user"]
        deployment = _deployment(raw | {"overlap": overlap}, each, name, each["context_tokens"])
        plan = deployment.at(a_gpu / a_user)
        compared = Comparison("tokens/s a user", plan.tokens_per_second_a_user, a_user, "tokens/s")
        found.append(Row(f"{each['name']}, {plan.requests:.0f} requests a GPU", plan, (compared,)))
    found += [_beside(raw, each, name, overlap) for each in raw["beside"]]
    return found, [Assumption(*pair) for pair in raw["assumptions"]]


def _beside(raw: Mapping[str, Any], row: Mapping[str, Any], name: str, overlap: str) -> Row:
    """What was not fitted."""
    plan = _deployment({**raw, "overlap": overlap}, row, name, None).at(row["requests"])
    computed = {"time a token": plan.seconds_a_token * 1e3, "tokens/s a GPU": plan.tokens_per_second_a_gpu}
    quantity = row["quantity"]
    return Row(row["name"], plan, (Comparison(quantity, computed[quantity], row["printed"], row["unit"]),))


def rates_of_table_6() -> tuple[str, ...]:
    return tuple(read(PRESETS / "report-table-6.json")["overlaps"])


def price_of_the_report() -> Figure:
    return figure_of("price_dollars_per_hour", read(PRESETS / "report-table-7.json")["price_dollars_per_hour"])


def _deployment(preset: Mapping[str, Any], row: Mapping[str, Any], name: str, context: int | None) -> Deployment:
    both = {**preset, **row}
    known = gpu(both["gpu"])
    return Deployment(
        model=model(both["model"]),
        machine=f"{both['gpus']} x {known.name}",
        rates=rates(known, name),
        layout=Layout(**both["layout"]),
        precision=Precision(**both["precision"]),
        context=context or both["context_tokens"],
        overlap=both["overlap"],
        drafts=Drafts(both["drafts"], both["acceptance"]),
        dollars_an_hour=price_of_the_report(),
    )


def _by_name(plan: Plan) -> dict[str, float]:
    return {each.name: each.seconds for stage in plan.step.stages for track in stage.tracks for each in track}

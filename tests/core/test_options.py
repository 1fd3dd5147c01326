"""The rows that say what becomes of an engine's options."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.options import Option, Outcome, markdown_table


def test_a_table_has_one_row_an_option_in_their_order() -> None:
    options = (
        Option("--enable-lora", Outcome.SERVED, "Adapters of 1 | 2 ranks.", "run on a CPU"),
        Option("--backend slow", Outcome.REFUSED, "It takes 11 columns.", "read"),
    )
    assert markdown_table(options).splitlines() == [
        "| option | with LongCat | why | how it is known |",
        "|---|---|---|---|",
        "| `--enable-lora` | served | Adapters of 1 \\| 2 ranks. | run on a CPU |",
        "| `--backend slow` | refused, with the reason, before any worker starts | It takes 11 columns. | read |",
    ]


def test_an_option_is_named_without_its_value() -> None:
    assert Option("--backend slow", Outcome.REFUSED, "", "").name == "--backend"
    assert Option("--enable-lora", Outcome.SERVED, "", "").name == "--enable-lora"

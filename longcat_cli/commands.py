"""The subcommands of `longcat`: one file each, which imports torch and engines only once it runs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import typer

from longcat_cli import doctor, dry_run, inspect, make_checkpoint, nano, place, plan, quantize, top, train_gate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.command("doctor")(doctor.command)
app.command("dry-run", context_settings=dry_run.CONTEXT)(dry_run.command)
app.command("inspect")(inspect.command)
app.command("make-checkpoint")(make_checkpoint.command)
app.command("nano")(nano.command)
app.command("place")(place.command)
app.command("plan")(plan.command)
app.command("quantize")(quantize.command)
app.command("top")(top.command)
app.command("train-gate")(train_gate.command)


@app.callback()
def longcat() -> None:
    """LongCat-Flash for vLLM and SGLang."""

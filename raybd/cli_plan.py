"""Commands about studies that run nothing: what each would do and cost, and which ones come along."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from raybd import cli_complete
from raybd.cli_echo import echo
from raybd.errors import StudyError


class PlanFormat(StrEnum):
    """How a plan or a list is printed."""

    TABLE = "table"
    JSON = "json"


DryOption = Annotated[bool, typer.Option("--dry-run", help="print the plan: trials, epochs, device-hours, storage")]
TflopsOption = Annotated[
    float | None, typer.Option(help="with --dry-run: hours of a device that sustains so many TFLOP/s", min=1e-6)
]
NoProbeOption = Annotated[bool, typer.Option("--no-probe", help="with --dry-run: run no short trial on this machine")]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        help="with --dry-run: hours and price on the machines of a cluster file", autocompletion=cli_complete.files
    ),
]
PriceOption = Annotated[
    list[str] | None,
    typer.Option("--price", metavar="TYPE=USD", help="with --cluster: what an hour of a machine costs"),
]
PlanFormatOption = Annotated[PlanFormat, typer.Option("--format", "-f", help="with --dry-run: how to print")]


def print_plan(
    study: str,
    overrides: list[str] | None,
    tflops: float | None,
    format_: PlanFormat,
    *,
    probe: bool,
    search: bool,
    cluster: str | None,
    prices: list[str] | None,
) -> None:
    """Print what a study would do and cost; see `planning.make`, and `planning.billed` for a cluster file.

    Mistakes in what is given are told before anything is measured.
    """
    from raybd import study_file

    priced = dict(_price(text) for text in prices or ())
    if priced and cluster is None:
        raise StudyError("of which cluster?", where="--price", fix="give its file with --cluster")

    found = study_file.load(study, overrides=overrides or [])
    # These import torch, which a mistake in the study does not wait for.
    from raybd import plan_sharing, planning
    from raybd.report import planned
    from raybd.train.probe import Unmeasured

    verdict = planning.priced(found, cluster, priced) if cluster is not None else None
    speed, unmeasured = None, None
    try:
        speed = planning.speed(found, tflops=tflops, probe=probe, search=search)
    except Unmeasured as error:
        unmeasured = error.what
    made = replace(planning.make(found, speed=speed, search=search), unmeasured=unmeasured)
    there = verdict.share if verdict is not None else None
    if search and (there is None or there.use_gpu):
        told = plan_sharing.told(found, made.sizes, probe=probe and tflops is None, elsewhere=there is not None)
        made = replace(made, sharing=told)
    plan = (planning.billed(made, verdict) if verdict is not None else made).as_dict()
    if format_ is PlanFormat.JSON:
        echo(json.dumps(plan, indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    console.print(planned.table(plan))
    for line in planned.lines(plan, gpu_wanted=found.resources.use_gpu is True):
        echo(line)


def _price(text: str) -> tuple[str, float]:
    name, _, amount = text.rpartition("=")
    try:
        return name, float(amount)
    except ValueError:
        raise StudyError(text, where="--price", expected="TYPE=USD, as in gpu_spot=0.5") from None


def studies(
    format_: Annotated[PlanFormat, typer.Option("--format", "-f", help="how to print")] = PlanFormat.TABLE,
) -> None:
    """List the studies that come along, each with the first line of its file."""
    from raybd import study_file

    found = study_file.descriptions()
    if format_ is PlanFormat.JSON:
        echo(json.dumps(found, indent=1))
        return
    width = max(map(len, found), default=0)
    for name, text in found.items():
        echo(f"{name:<{width}}  {text}")

"""The command line. YAML says what, flags say how; nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raybd import cli_complete
from raybd.cli_dashboard import dashboard
from raybd.cli_data import data_app
from raybd.cli_doctor import doctor
from raybd.cli_echo import Commands, echo, log_to_screen
from raybd.cli_export import export
from raybd.cli_init import init, schema
from raybd.cli_jobs import DetachOption, detach, stop
from raybd.cli_plan import (
    ClusterOption,
    DryOption,
    NoProbeOption,
    PlanFormat,
    PlanFormatOption,
    PriceOption,
    TflopsOption,
    print_plan,
    studies,
)
from raybd.cli_status import RunArgument, logs, require_run, status
from raybd.cli_validate import validate
from raybd.errors import RaybdError, StudyError

if TYPE_CHECKING:
    from rich.table import Table

    from raybd import analysis
    from raybd.console import View
    from raybd.study_directory import Outcome

FAILED_TRIALS = 4


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class FrontKind(StrEnum):
    """Which epochs compete for a front."""

    ANY_EPOCH = "any_epoch"
    FINAL = "final"


app = typer.Typer(
    name="raybd",
    cls=Commands,
    help="Can a backdoored CLIP model be cleaned, and at what cost in accuracy?",
    no_args_is_help=True,
    rich_markup_mode=None,  # what draws boxes round the help takes longer to load than all the rest
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.add_typer(data_app, name="data")
app.command()(studies)
app.command()(init)
app.command()(schema)
app.command()(validate)
app.command()(doctor)
app.command()(export)

StudyArgument = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="study file, or the name of one that comes along", autocompletion=cli_complete.studies
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting, e.g. data.root=/shards")
]
RunDirOption = Annotated[str | None, typer.Option("--run-dir", help="where results go  [default: runs/STUDY]")]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster, `auto` or host:port; default: this machine")]
JobAddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster, `auto` or host:port, with --detach http://HEAD:8265; default: this machine"),
]
CodeOption = Annotated[
    bool, typer.Option("--allow-code-change", help="go on with results that another version of raybd made")
]
NearestOption = Annotated[
    bool, typer.Option("--nearest", help="of a learning rate not recorded, take the nearest that is")
]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="how to print")]


def _carry_out(
    study: str,
    overrides: list[str] | None,
    run_dir: str | None,
    address: str | None,
    *,
    until: str,
    allow_code_change: bool,
) -> None:
    """Run a study as far as `until` and print where it leaves off."""
    from raybd import study_file

    found = study_file.anchored(study_file.load(study, overrides=overrides or []))
    where = run_dir or f"runs/{found.name}"
    from raybd.console import View
    from raybd.driving import driving

    view = View()
    with driving(found, where, view) as store:
        view.line("loading torch and open_clip", style="dim")
        from raybd.stages import Run, Stage

        run = Run(found, store, view, address=address, allow_code_change=allow_code_change)
        outcome = run.run(Stage[until.upper()])
    _print_outcome(where, outcome, view)


def _print_outcome(where: str, outcome: Outcome, view: View) -> None:
    """Print what a search led to. Errors: typer.Exit where trials or pretraining runs failed."""
    from raybd import analysis

    _print_fronts(analysis.Run.read(where), kind=FrontKind.ANY_EPOCH)
    view.line(f"report: {outcome.report}")
    view.line(f"fronts again, with all other measures: raybd pareto {where}")
    if outcome.failed:
        view.warn(f"{outcome.failed} trials failed; the report says why")
    if outcome.failed_pretraining:
        view.warn("pretraining failed in part: called again, this command tries it again")
    if outcome.failed or outcome.failed_pretraining:
        raise typer.Exit(FAILED_TRIALS)


def _once(runs: list[str]) -> None:
    """Raise RaybdError where a run is given twice."""
    if len(set(runs)) < len(runs):
        raise RaybdError("a run is given twice", where=" ".join(runs), fix="give each run once")


def _print_fronts(run: analysis.Run, *, kind: FrontKind) -> None:
    from raybd import fronts
    from raybd.report import grids, text

    summaries = fronts.summarise(run.fronts)
    _print_tables(map(text.rendered, grids.methods(summaries, kind=kind)))
    shown = run.trials_named({row["trial_id"] for row in run.fronts})
    _print_tables(text.front_tables(summaries, shown, kind=kind))


def _print_tables(tables: Iterable[Table]) -> None:
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=100)
    for table in tables:
        console.print(table)


@app.command()
def demo(run_dir: RunDirOption = None) -> None:
    """Run the demo study: emoji drawings, two pretrain objectives, a small search, in minutes on two cores."""
    _carry_out("demo", None, run_dir, None, until="search", allow_code_change=False)


@app.command()
def run(
    study: StudyArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    address: JobAddressOption = None,
    detach_: DetachOption = False,  # noqa: FBT002
    allow_code_change: CodeOption = False,  # noqa: FBT002
    dry_run: DryOption = False,  # noqa: FBT002
    tflops: TflopsOption = None,
    no_probe: NoProbeOption = False,  # noqa: FBT002
    cluster: ClusterOption = None,
    price: PriceOption = None,
    format_: PlanFormatOption = PlanFormat.TABLE,
) -> None:
    """Carry a study out: poison, pretrain, search, fronts, report. Called again, it goes on where it stopped."""
    if dry_run:
        print_plan(study, set_, tflops, format_, probe=not no_probe, search=True, cluster=cluster, prices=price)
        return
    if detach_:
        detach(study, set_, run_dir, address, allow_code_change=allow_code_change)
        return
    if address and address.startswith(("http://", "https://")):
        raise StudyError(
            "the address of a job API", where=f"--address {address}", fix="add --detach, or give host:port"
        )
    _carry_out(study, set_, run_dir, address, until="search", allow_code_change=allow_code_change)


@app.command()
def pretrain(
    study: StudyArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    address: AddressOption = None,
    allow_code_change: CodeOption = False,  # noqa: FBT002
    dry_run: DryOption = False,  # noqa: FBT002
    tflops: TflopsOption = None,
    no_probe: NoProbeOption = False,  # noqa: FBT002
    cluster: ClusterOption = None,
    price: PriceOption = None,
    format_: PlanFormatOption = PlanFormat.TABLE,
) -> None:
    """Poison and pretrain only: one model for each pretrain objective."""
    if dry_run:
        print_plan(study, set_, tflops, format_, probe=not no_probe, search=False, cluster=cluster, prices=price)
        return
    _carry_out(study, set_, run_dir, address, until="pretrain", allow_code_change=allow_code_change)


@app.command()
def replay(
    study: StudyArgument,
    on: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="recorded curves: a sweep.parquet, or a run directory",
            autocompletion=cli_complete.runs,
        ),
    ],
    nearest: NearestOption = False,  # noqa: FBT002
    set_: SetOption = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="where results go  [default: runs/STUDY-replay]")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Run a study's search against recorded curves: real Ray Tune, Optuna and tables, no training."""
    from raybd import study_file
    from raybd.console import View
    from raybd.driving import driving

    found = study_file.load(study, overrides=set_ or [])
    where = run_dir or f"runs/{found.name}-replay"
    view = View()
    with driving(found, where, view) as store:
        from raybd.replaying import ReplayRun

        outcome = ReplayRun(found, store, view, on=on, nearest=nearest, address=address).run()
    _print_outcome(where, outcome, view)


@app.command()
def poison(
    study: StudyArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    preview: Annotated[Path | None, typer.Option(help="write a picture of before, trigger and after here")] = None,
) -> None:
    """Draw the poison plan and write it into the run directory; nothing is trained."""
    from raybd import study_file

    if preview and not os.path.isdir(preview.parent):
        raise StudyError("no such folder", where=f"--preview {preview}", fix=f"mkdir -p {preview.parent}")
    found = study_file.anchored(study_file.load(study, overrides=set_ or []))
    where = run_dir or f"runs/{found.name}"
    from raybd.console import View
    from raybd.driving import driving

    view = View()
    with driving(found, where, view) as store:
        from raybd.stages import Run

        run = Run(found, store, view)
        run.poison()
    view.line(f"plan: {run.store.path('tables/poison_plan/plan.parquet')}")
    if preview:
        preview.write_bytes(run.store.get("preview.png"))
        view.line(f"preview: {preview}")


@app.command()
def pareto(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN…",
            help="run directory; several are seeds of one study",
            autocompletion=cli_complete.runs,
        ),
    ],
    format_: FormatOption = Format.TABLE,
    kind: Annotated[FrontKind, typer.Option(help="for tables: which epochs compete")] = FrontKind.ANY_EPOCH,
) -> None:
    """Print fronts and what they are worth, stability, blind choices, and how pretrain objectives differ."""
    from raybd import analysis
    from raybd.report import grids, text
    from raybd.store import Store

    _once(runs)
    for name in runs:
        require_run(Store(name))
    read = [analysis.Run.read(name) for name in runs]
    for run in read:
        if not run.fronts:
            raise RaybdError("no trial has ended yet", where=run.name, fix="let `raybd run` go on")
    if format_ is Format.CSV:
        echo(text.as_csv({run.name: run.fronts for run in read}), nl=False)
        return
    found = analysis.analyse(read, by_trial=format_ is Format.JSON)
    if format_ is Format.JSON:
        echo(text.as_json(found))
        return
    for run, measured in zip(read, found["runs"], strict=True):
        if len(read) > 1:
            echo(f"run {run.name}\n")
        _print_fronts(run, kind=kind)
        _print_tables(map(text.rendered, grids.of_run(measured, run.trials_named(analysis.named(measured)))))
    _print_tables(map(text.rendered, grids.between(found)))


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="run directory, or a file of weights", autocompletion=cli_complete.runs
        ),
    ],
    data: Annotated[str | None, typer.Option(help="root of other shards  [default: the study's]")] = None,
    test: Annotated[str | None, typer.Option(help="their pattern  [default: test/*.tar*]")] = None,
    classes: Annotated[str | None, typer.Option(help="name or file  [default: classes.json of the root]")] = None,
    templates: Annotated[str | None, typer.Option(help="name of prompt templates  [default: the study's]")] = None,
    target_class: Annotated[str | None, typer.Option(help="of the attack, in these classes")] = None,
    retrieval: Annotated[bool, typer.Option("--retrieval", help="recall of captions, not classes")] = False,  # noqa: FBT002
    point: Annotated[list[str] | None, typer.Option(metavar="TRIAL:EPOCH", help="these, not the front")] = None,
    study: Annotated[str | None, typer.Option(help="for a file: the study with its trigger")] = None,
    name: Annotated[str | None, typer.Option("--model", help="for a file: open_clip name, if not the study's")] = None,
    format_: FormatOption = Format.TABLE,
) -> None:
    """Evaluate the poisoned models and front points of a run, or a file of weights, on any labelled shards."""
    from raybd.store import Store

    lone = os.path.isfile(model)
    if lone != bool(study) or (name and not lone) or (point and lone):
        raise StudyError(
            "a file of weights needs --study, a run has its own",
            where=model,
            expected="raybd evaluate RUN [--point …], or raybd evaluate FILE --study STUDY [--model NAME]",
        )
    if not lone:
        require_run(Store(model))
    from raybd import evaluations

    task = evaluations.Task.RETRIEVAL if retrieval else evaluations.Task.ZEROSHOT
    request = evaluations.Request(task, data, test, classes, templates, target_class)
    if study:
        rows = evaluations.evaluate_file(model, request, study=study, model=name)
    else:
        rows = evaluations.evaluate_run(
            Store(model), request, chosen=point or (), notify=lambda text: echo(text, err=True)
        )
    from raybd.report import evaluations as shown

    if format_ is Format.JSON:
        echo(shown.as_json(rows))
    elif format_ is Format.CSV:
        echo(shown.as_csv(rows), nl=False)
    else:
        _print_tables(shown.evaluation_tables(rows))


@app.command()
def report(
    run: RunArgument,
    seeds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SEED…]", help="runs of the same study with other seeds", autocompletion=cli_complete.runs
        ),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="write its figures here, as PNG and PDF for print")] = None,
) -> None:
    """Write report.html of a run from its tables."""
    from raybd.report import html
    from raybd.store import Store

    _once([run, *(seeds or [])])
    store, others = Store(run), [Store(name) for name in seeds or []]
    for found in (store, *others):
        require_run(found)
    echo(html.write(store, seeds=others, figures_in=figures))


app.command()(status)
app.command()(dashboard)
app.command()(logs)
app.command()(stop)


def main() -> None:
    """Run the command line; an error that raybd foresaw is printed without a traceback."""
    log_to_screen()
    try:
        app()
    except RaybdError as error:
        echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

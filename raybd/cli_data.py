"""The commands below `raybd data`: other people's data and sweeps, brought into the form that raybd reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raybd.cli_echo import Commands, echo
from raybd.errors import StudyError

data_app = typer.Typer(
    cls=Commands,
    help="Bring data into the form that studies read, and the sweeps of others into tables.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
import_app = typer.Typer(
    cls=Commands,
    help="Turn image folders, CSV lists or CIFAR-10 into shards.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data_app.add_typer(import_app, name="import")


def _print_imported(imported: object) -> None:
    from raybd.data.imports import Imported

    assert isinstance(imported, Imported)
    counts = ", ".join(f"{number} {split}" for split, number in imported.samples.items())
    echo(f"{imported.out}: {counts} samples, {len(imported.classes)} classes")
    for skip in imported.skipped[:10]:
        echo(f"  skipped {skip.source}: {skip.why}")
    if len(imported.skipped) > 10:
        echo(f"  … {len(imported.skipped)} skipped in all")
    echo(f"use it: raybd run STUDY --set data.root={imported.out}")


OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the shards")]
TestShare = Annotated[float, typer.Option(help="share of the images kept for evaluation")]
Template = Annotated[str, typer.Option(help="caption of an image, {} is its class")]


@import_app.command("folder")
def import_folder(
    folder: Annotated[Path, typer.Argument(help="one sub-folder for each class, or train/ and test/ of such")],
    out: OutArgument,
    caption_template: Template = "a photo of a {}.",
    test_share: TestShare = 0.1,
    seed: int = 0,
) -> None:
    """Import an image folder."""
    from raybd.data.imports import from_folder

    _print_imported(from_folder(folder, out, caption_template=caption_template, test_share=test_share, seed=seed))


@import_app.command("csv")
def import_csv(
    table: Annotated[Path, typer.Argument(help="CSV or TSV with a header")],
    out: OutArgument,
    image_column: Annotated[str, typer.Option(help="column of image paths")] = "image",
    caption_column: Annotated[str, typer.Option(help="column of captions")] = "caption",
    label_column: Annotated[str | None, typer.Option(help="column of class names")] = None,
    root: Annotated[Path | None, typer.Option(help="what image paths are relative to  [default: the CSV]")] = None,
    test_share: TestShare = 0.1,
    seed: int = 0,
) -> None:
    """Import a list of image paths and captions."""
    from raybd.data.imports import from_csv

    _print_imported(
        from_csv(
            table,
            out,
            image_column=image_column,
            caption_column=caption_column,
            label_column=label_column,
            root=root,
            test_share=test_share,
            seed=seed,
        )
    )


@import_app.command("cifar10")
def import_cifar10(
    out: OutArgument,
    root: Annotated[Path, typer.Option(help="folder of torchvision's download")] = Path("."),
    download: Annotated[bool, typer.Option(help="download it there first")] = False,  # noqa: FBT002
    caption_template: Template = "a photo of a {}.",
) -> None:
    """Import torchvision's CIFAR-10."""
    from raybd.data.imports import from_cifar10

    _print_imported(from_cifar10(out, root=root, download=download, caption_template=caption_template))


@data_app.command("import-sweep")
def import_sweep(
    table: Annotated[Path, typer.Argument(metavar="CSV", help="a row for each epoch of each cleaning run")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="run directory to make: a path or s3://…")],
    only: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="read the rows that have this; may be repeated")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="CSV of the same poisoned models, for epochs 0 that are missing")
    ] = None,
) -> None:
    """Read somebody's cleaning sweep into tables, for pareto, report and replay."""
    from raybd import fronts, tables
    from raybd.store import Store
    from raybd.sweeps import import_sweep as read_sweep

    wanted = {}
    for given in only or []:
        column, equals, value = given.partition("=")
        if not equals:
            raise StudyError("not of the form COLUMN=VALUE", where=f"--only {given}")
        wanted[column] = value
    curves = read_sweep(str(table), out, only=wanted, baseline=str(baseline) if baseline else None)
    echo(f"{out}: {len(curves)} runs, {sum(len(curve.epochs) for curve in curves)} points")
    for found in fronts.summarise(tables.read(Store(out), "fronts").to_pylist()):
        if found["kind"] == "any_epoch":
            echo(
                f"  {found['objective']} cleaned by {found['method']}: front of {len(found['front'])} points, "
                f"hypervolume {found['hypervolume']:.4f}"
            )
    echo(f"fronts: raybd pareto {out}\nreport: raybd report {out}")
    echo(f"replay: raybd replay STUDY --on {out.rstrip('/')}/sweep.parquet")

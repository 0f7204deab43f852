"""The command that says what this machine has, and whether raybd can work on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from raybd.cli_echo import echo
from raybd.cli_plan import PlanFormat
from raybd.errors import ClusterError

if TYPE_CHECKING:
    from raybd.doctor import Finding


def doctor(
    format_: Annotated[PlanFormat, typer.Option("--format", "-f", help="how to print")] = PlanFormat.TABLE,
) -> None:
    """Say what this machine has, and whether raybd can work on it; exit code 3 where it cannot."""
    from raybd import doctor as looked

    findings = list(looked.examine())
    problems = [finding for finding in findings if finding.state is looked.State.PROBLEM]
    if format_ is PlanFormat.JSON:
        echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    if problems:
        raise typer.Exit(ClusterError.exit_code)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        echo(f"{finding.state:<7}  {finding.what:<{width}}  {finding.found}")
        if finding.fix:
            echo(f"{'':<7}  {'':<{width}}  → {finding.fix}")

"""What commands are given: taken as it is, or converted and refused by typer."""

from __future__ import annotations

from enum import Enum
from typing import Any

import typer
from typer.testing import CliRunner

from raybd import cli_values
from raybd.cli import app

runner = CliRunner()


def each_parameter(command: Any) -> list[Any]:
    """Return the parameters of a command and of those below it."""
    below = [parameter for inner in getattr(command, "commands", {}).values() for parameter in each_parameter(inner)]
    return [*command.params, *below]


def test_values_taken_as_they_are_are_those_that_typer_makes_of_them() -> None:
    """Texts, lists of texts, choices and what is not given; all else is left to typer."""
    taken = 0
    for parameter in each_parameter(typer.main.get_command(app)):
        annotation = parameter.type_descriptor.annotation
        members = list(annotation) if isinstance(annotation, type) and issubclass(annotation, Enum) else []
        for value in (None, "", "x", "7", "--", ("a",), ("a", "b"), [], 1.5, *members, *(m.value for m in members)):
            found = cli_values._as_given(parameter, annotation, value)
            if found is not cli_values._OTHER:
                expected = parameter.get_runtime_param().coerce(value, param=parameter, ctx=None)
                assert (type(found), found) == (type(expected), expected), (parameter.name, value)
                taken += 1
    assert taken > 100


def test_what_is_no_choice_is_still_refused() -> None:
    refused = runner.invoke(app, ["pareto", ".", "-f", "tables"])
    assert refused.exit_code == 2
    assert "'tables' is not one of 'table', 'json', 'csv'" in refused.output
    assert "Missing argument" in runner.invoke(app, ["pareto"]).output

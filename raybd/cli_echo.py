"""How commands print: nothing that was read from a file steers the terminal, and help is whole."""

from __future__ import annotations

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from raybd.cli_values import take_as_given
from raybd.plain import plain


class Commands(TyperGroup):
    """Commands whose sentences stand whole in the help of their group, wrapped where the screen ends.

    What they are given is taken as it is where it needs no conversion.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the words that come before the name of a command."""
        for parameter in self.get_params(ctx):
            take_as_given(parameter)
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a name; None if there is none."""
        command = super().get_command(ctx, cmd_name)
        for parameter in command.get_params(ctx) if command else ():
            take_as_given(parameter)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        for command in self.commands.values():
            command.short_help = command.short_help or command.help
        super().format_commands(ctx, formatter)


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text, what steers terminals escaped.

    Args:
        nl: end the line.
        err: to standard error.
    """
    typer.echo(plain(text), nl=nl, err=err)


class PlainFormatter(logging.Formatter):
    """Formats what is logged, what steers terminals escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return plain(super().format(record))


def log_to_screen(handler: logging.Handler | None = None, *, form: str = "%(levelname)s: %(message)s") -> None:
    """Let raybd's warnings go to standard error, or to a `handler`, and nowhere else."""
    handler = handler or logging.StreamHandler()
    handler.setFormatter(PlainFormatter(form))
    logger = logging.getLogger("raybd")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)

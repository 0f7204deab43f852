"""The one way in which commands print text: nothing that was read from a file steers the terminal."""

from __future__ import annotations

import logging

import typer

from raybd.plain import plain


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

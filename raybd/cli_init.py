"""Commands for whoever writes a study: the schema that editors check it by."""

from __future__ import annotations

from raybd.cli_echo import echo


def schema() -> None:
    """Print the JSON Schema of study files, by which editors complete and check them."""
    from raybd import study_schema

    echo(study_schema.text(), nl=False)

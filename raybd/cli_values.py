"""Values of commands that need no conversion, taken as they are.

typer has pydantic convert every value, also texts, and to load it takes as long as all of `raybd --help`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

_OTHER = object()  # a value that typer has to convert, or to refuse


def take_as_given(parameter: Any) -> None:
    """Have a parameter of a command take texts, members of an enum and nothing at all without typer's conversion.

    What else it is given goes to typer, whose messages say what is wrong with it.

    Args:
        parameter: what typer makes of an argument or option; one of a typer that tells no types of its values stays
            as it is.
    """
    described = getattr(parameter, "type_descriptor", None)
    parsed = getattr(getattr(described, "parameter_info", None), "parser", None)
    annotation = getattr(described, "annotation", None)
    if annotation is None or parsed is not None or "process_value" in vars(parameter):
        return
    convert = parameter.process_value

    def process_value(ctx: Any, value: Any) -> Any:
        found = _as_given(parameter, annotation, value)
        if found is _OTHER:
            return convert(ctx, value)
        return found if parameter.callback is None else parameter.callback(ctx, parameter, found)

    parameter.process_value = process_value


def _as_given(parameter: Any, annotation: Any, value: Any) -> Any:
    """Return a value as a command takes it, or `_OTHER`."""
    if value is None:
        if parameter.required:
            return _OTHER
        return () if parameter.multiple or parameter.nargs == -1 else None
    if annotation is str and type(value) is str:
        return value
    if annotation == list[str] and isinstance(value, list | tuple) and value and {type(v) for v in value} == {str}:
        return list(value)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return next((member for member in annotation if value in (member, member.value)), _OTHER)
    return _OTHER

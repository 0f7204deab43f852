"""Secrets that were written into a file, found without ever showing them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raybd.study.mistakes import Place

# What a value is by its form. In commands they stand among other words.
_FORMS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*",
    "a GitHub token": r"\b(?:gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a Google API key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a password within a URL": r"://[^\s/:@$]+:[^\s/:@$]+@",
}
_FORM = {kind: re.compile(form) for kind, form in _FORMS.items()}
_SECRET_NAME = (
    r"\w*(?:secret|password|passwd|access[_-]?key|api[_-]?key|private[_-]?key|credentials|(?:auth|access|session)[_-]?token"
    r"|(?<![a-z])token)\w*"
)
_NAME = re.compile(rf"(?i){_SECRET_NAME}")
# NAME=value and --name value, as commands give them.
_GIVEN = re.compile(rf"(?i)(?<![\w$])(--)?({_SECRET_NAME})(?:=|(?(1)\s+|=))[\"']?([^\s\"';&|]+)")
_LOGIN = re.compile(r"\blogin\b[^;&|]{0,200}?\s-p[ =]?[\"']?([^\s\"';&|]+)")
_NO_SECRET = re.compile(r"[$~./<]|-?\d?$")  # a variable, a path, what is to be filled in, a flag
_SHOWN_ELSEWHERE = ("file_mounts",)  # its keys are paths


def found(config: Any) -> Iterator[tuple[Place, str, str]]:
    """Yield each secret of a cluster file: where it stands, what it is called, and the secret itself, not to be shown.

    A path to a file of keys, a variable (`$TOKEN`) and a number of one digit are none.
    """
    for place, key, value in _texts(config, ()):
        for text in (key, value):
            for kind, form in _FORM.items():
                for match in form.finditer(text):
                    yield place, kind, match[0]
        if place[0] not in _SHOWN_ELSEWHERE and _NAME.fullmatch(key) and not _NO_SECRET.match(value):
            yield place, "a secret by its name", value
        for given in _GIVEN.finditer(value):
            if not _NO_SECRET.match(given[3]):
                yield place, f"a value for {given[2][:50]}", given[3]
        for login in _LOGIN.finditer(value):
            if not _NO_SECRET.match(login[1]):
                yield place, "a password", login[1]


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str, str]]:
    """Yield (place, key, text) of each value below a place; the items of a list have the list's key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            at = (*place, str(key))
            if isinstance(inner, dict | list):
                yield at, str(key), ""
            yield from _texts(inner, at)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _texts(inner, (*place, i))
    elif value is not None and not isinstance(value, bool):
        key = next((part for part in reversed(place) if isinstance(part, str)), "")
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        yield place, key, text


def hidden(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """Return a text without some secrets, and without anything that has the form of one."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "…")
    for form in _FORM.values():
        text = form.sub("…", text)
    return text

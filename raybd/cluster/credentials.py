"""Secrets that were written into a file, found without ever showing them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raybd.cluster.walk import walk
from raybd.store import credentials_form
from raybd.study.mistakes import Place

# What a value is by its form. In commands they stand among other words.
_FORMS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*",
    "a GitHub token": r"\b(?:gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a Google API key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
}
_FORM = {
    **{kind: re.compile(form) for kind, form in _FORMS.items()},
    "a password within a URL": credentials_form(r"""\s$"'"""),  # a variable is none
}
_SECRET_NAME = (
    r"\w*(?:secret|password|passwd|access[_-]?key|api[_-]?key|private[_-]?key|credentials|(?:auth|access|session)[_-]?token"
    r"|(?<![a-z])token(?![a-z]))\w*"
)
_NAME = re.compile(rf"(?i){_SECRET_NAME}")
# NAME=value and --name value, as commands give them.
_GIVEN = re.compile(rf"(?i)(?<![\w$])(--)?({_SECRET_NAME})(?:=|(?(1)\s+|=))[\"']?([^\s\"';&|]+)")
_LOGIN = re.compile(r"\blogin\b[^;&|]{0,200}?\s-p[ =]?[\"']?([^\s\"';&|]+)")
_NO_SECRET = re.compile(
    r"(?i)[$~./<]|-?\d?$|(?:true|false|yes|no|none)$"
)  # a variable, a path, what is to be filled in
_PATHS = ("file_mounts",)  # sections whose keys are paths


def found(config: Any) -> Iterator[tuple[Place, str, str]]:
    """Yield each secret of a cluster file: where it stands, what it is called, and the secret itself, not to be shown.

    A path to a file of keys, a variable (`$TOKEN`), yes and no are none.
    """
    for place, _, value in walk(config):
        key, text = next(str(part) for part in reversed(place) if isinstance(part, str)), _text(value)
        # The items of a list have the list's key, which is looked at once.
        for shown in (key, text) if isinstance(place[-1], str) else (text,):
            for kind, form in _FORM.items():
                for match in form.finditer(shown):
                    yield place, kind, match[0]
        if place[0] not in _PATHS and _NAME.fullmatch(key) and not _NO_SECRET.match(text):
            yield place, "a secret by its name", text
        for given in _GIVEN.finditer(text):
            if not _NO_SECRET.match(given[3]):
                yield place, f"a value for {given[2][:50]}", given[3]
        for login in _LOGIN.finditer(text):
            if not _NO_SECRET.match(login[1]):
                yield place, "a password", login[1]


def _text(value: object) -> str:
    """Return a value as it would be written; "" of what has values of its own, and of what says yes, no or nothing."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "" if value is None or isinstance(value, bool | dict | list) else str(value)


def hidden(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """Return a text without some secrets, and without anything that has the form of one."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "…")
    for form in _FORM.values():
        text = form.sub("…", text)
    return text

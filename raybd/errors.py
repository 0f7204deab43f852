"""Errors as part of the interface: each says what is wrong, where, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class RaybdError(Exception):
    """Base of all errors that raybd raises on purpose; `str()` of it is the whole message for a user.

    Args:
        what: the fault, in one sentence.
        where: file:line, field, shard or trial that it concerns.
        expected: what would have been right.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.expected, self.fix = what, where, expected, fix

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.fix))


def _rebuild(cls: type[RaybdError], what: str, where: str, expected: str, fix: str) -> RaybdError:
    return cls(what, where=where, expected=expected, fix=fix)


class StudyError(RaybdError):
    """The study file, a cluster file, a setting or the command line is wrong."""

    exit_code = 2


class DataError(RaybdError):
    """Shards, captions, classes or tables are missing or broken."""


class CheckpointError(RaybdError):
    """A checkpoint is missing, unreadable, or of another model."""


class ClusterError(RaybdError):
    """The machine or the cluster cannot carry the study."""

    exit_code = 3


class StorageError(RaybdError):
    """The run directory's disk or bucket does not take or give files: no fault of the trial that met it."""

    exit_code = 3


class LockedError(RaybdError):
    """Another driver works on the run directory."""

    exit_code = 3


class SupersededError(RaybdError):
    """A later attempt has taken a run over, or it was ended: what this process has of it counts no more."""


class TrialError(RaybdError):
    """A pretraining or cleaning run failed in itself, or too many of them did."""


class NonFiniteError(TrialError):
    """A loss is not finite: the same settings would lead there again."""


class Misfit(ValueError):
    """Settings that do not go together, for a validator to raise: the fields concerned, each with a sentence.

    Args:
        faults: (where the field is, below the section that is validated; sentence).
    """

    def __init__(self, faults: Sequence[tuple[tuple[str | int, ...], str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(": ".join((*filter(None, (dotted(at),)), what)) for at, what in faults))

    def below(self, section: str) -> Misfit:
        """Return the same of the section above."""
        return Misfit([((section, *at), what) for at, what in self.faults])


def dotted(at: Sequence[str | int]) -> str:
    """Return the place of a field as settings are named: `search.space.lr`."""
    return ".".join(map(str, at))

"""What the driver of a search makes of faults: which are a trial's, which the cluster's, which end the search."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray.cloudpickle
from ray.exceptions import OutOfMemoryError, RayError

from raybd import failures
from raybd.assignment import Assignment, done_already, require_started, settle, stop
from raybd.errors import ClusterError, StorageError, SupersededError, TrialError
from raybd.ledger import Entry, Kind, Ledger
from raybd.store import Store
from raybd.study import Failure, Study

log = logging.getLogger(__name__)

# What Ray says of an actor whose machine went: no error class of its own tells it.
_MACHINE_GONE = ("its node has died", "node was preempted", "owner has died")
# And of one that its out-of-memory killer killed before it had started: there the error's class is lost.
_LOW_ON_MEMORY = "running low on memory"
_FEWEST = 5  # failures; fewer say little
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class Faults:
    """The driver's account of a search's trials: their failures, and what ends the search before they are done.

    Ray calls it from within its own loop, where an exception would be taken for a failure of some trial: what goes
    wrong here is kept as `error`, the search is stopped, and every trial that runs is left as it is.

    Args:
        entries: what the ledger has now of the trials of this search.
        planned: how many trials it has in all.
        on_end: called with the entry of each trial that ended or waits at a rung.
    """

    def __init__(
        self, study: Study, store: Store, entries: list[Entry], *, planned: int, on_end: Callable[[Entry], None]
    ) -> None:
        self._study, self._store, self._on_end = study, store, on_end
        self._known = {entry.id: len(entry.failures) for entry in entries}
        # Not the entries: of thousands of trials they are most of what a driver would hold.
        self._planned, self._ended = planned, set[str]()
        self._failed: dict[str, tuple[str, str | None, str | None]] = {}
        self._count(entry for entry in entries if entry.ended is not None)
        self._actors: dict[str, Assignment] = {}
        self.error: Exception | None = None
        self.events = 0  # trials ended and attempts failed: whether a search gets on at all

    def __getstate__(self) -> dict[str, Any]:
        """Stay behind: Ray pickles what it is given, with its snapshots."""
        return {}

    def guard(self, act: Callable[[], Any]) -> Any:
        """Do something, and return what it returns; None after an error, which ends the search."""
        if self.error is None:
            try:
                return act()
            except Exception as error:
                self.error = error
        return None

    def started(self, task: Assignment, actor: object) -> None:
        """Take note of which actor has a trial: Ray's own out-of-memory killer names actors."""
        self._actors[str(actor)] = task

    def settled(self, task: Assignment) -> Entry | None:
        """Return the entry of a trial that ended or waits at a rung; if it does neither, it is ended as failed.

        None where the ledger fails, which ends the search.
        """
        found: Entry | None = self.guard(lambda: settle(self._store, self._study, task))
        return found

    def ended(self, task: Assignment) -> None:
        """Pass on the end of a trial, or that it waits at a rung."""
        # Its process is kept for another trial: what befalls it before that is nothing to this one.
        self._actors = {actor: of for actor, of in self._actors.items() if of.trial_id != task.trial_id}
        self._pass_on(self.settled(task))

    def stopped(self, trial_id: str, reason: str) -> bool:
        """Stop a trial that waits at a rung; return whether the search goes on: not where the ledger fails."""
        self._pass_on(self.guard(lambda: stop(self._store, trial_id, reason)))
        return self.error is None

    def _pass_on(self, entry: Entry | None) -> None:
        if entry is None:
            return
        self.events += 1
        self.guard(lambda: self._on_end(entry))
        if entry.ended is not None:
            self._count([entry])
            self.guard(self.check_share)

    def _count(self, ended: Iterable[Entry]) -> None:
        for entry in ended:
            self._ended.add(entry.id)
            self._failed.update({failed[0]: failed for failed in failures.failed_trials([entry])})

    def check_share(self) -> None:
        """Raise TrialError where so many trials failed that the rest are not worth their cost."""
        count, most = len(self._failed), self._study.search.max_failed
        if count < _FEWEST or count <= most * self._planned or len(self._ended) >= self._planned:
            return
        failed = list(self._failed.values())
        raise TrialError(
            f"{count} of {self._planned} planned trials failed ({count / self._planned:.0%}), more than "
            f"search.max_failed={most:g} allows; most often {failures.reasons(failed)[0]}",
            where=self._store.uri,
            fix=f"read {failures.traceback_name(failed[0][0])} there, and mend the cause; or let the others run, with "
            "--set search.max_failed=1",
        )

    def is_over(self, task: Assignment, error: BaseException) -> bool:
        """Take note of an attempt that Ray saw fail; return whether the trial is over.

        The worker itself recorded what it could; the death of a machine is nobody's failure.

        Errors: StorageError where the worker met one.
        """
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, StorageError):
            raise cause
        ledger = Ledger(self._store)
        if done_already(ledger, task) is not None:
            return True  # all was recorded before its process died
        known = self._known.get(task.trial_id, 0)
        noted = self._known[task.trial_id] = ledger.failure_count(Kind.TRIAL, task.trial_id)
        if isinstance(cause, SupersededError):
            return False
        if getattr(error, "preempted", False) or any(words in str(error) for words in _MACHINE_GONE):
            log.warning("%s lost its machine: it goes on from its last finished epoch", task.trial_id)
            return False
        entry = require_started(self._store, self._study, task)
        if noted == known:
            kind, message = _reason(error, cause)
            trace = _COLOUR.sub("", str(error))
            entry = failures.note(self._store, task.trial_id, kind, message, trace=trace)
        self._known[task.trial_id] = len(entry.failures)
        self.events += 1
        if failures.is_final(entry, self._study.search):
            return True
        log.warning("%s failed and is tried again: %s", task.trial_id, failures.one_line(entry.failures[-1]["message"]))
        return False

    def broke_off(self, error: Exception) -> None:
        """Take note of why Ray gave a whole search up, which may be called again.

        Errors: ClusterError where the cluster is gone; the error itself where it is neither that nor memory.
        """
        causes = list(_chain(error))
        killed = next((cause for cause in causes if isinstance(cause, OutOfMemoryError)), None)
        if killed is None:
            raise _cluster_error(error) from None
        # Tune takes Ray's out-of-memory killer for an error of its own and stops; it names the actors that it killed.
        named = set(re.findall(r"Selected to kill: \(?Actor\((\w+)\)", str(killed)))
        for actor, task in self._actors.items():
            if any(name in actor for name in named) and self.is_over(task, killed):
                self.ended(task)


def _reason(error: BaseException, cause: BaseException) -> tuple[Failure, str]:
    """Return kind and message of a failure that the worker could not record itself."""
    if isinstance(error, OutOfMemoryError) or _LOW_ON_MEMORY in str(error):
        return Failure.OUT_OF_MEMORY, "killed by Ray: its machine ran out of memory"
    if cause is not error:
        return failures.kind_of(cause), failures.message_of(cause)
    if isinstance(error, RayError):
        return Failure.DIED, _exit_words(str(error))
    return failures.kind_of(error), failures.message_of(error)


def _exit_words(text: str) -> str:
    """Return what Ray says of the death of a process, without its guesses."""
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]+)", text)
    return f"its process died: {found[2].strip()} ({found[1]})" if found else f"its process died: {_last_line(text)}"


def _last_line(text: str) -> str:
    return failures.one_line("\n".join(reversed(text.splitlines())))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cluster_error(error: Exception) -> Exception:
    """Return an error that says the cluster is gone, where it is; otherwise the error itself."""
    if not any(isinstance(cause, (RayError, ConnectionError)) for cause in _chain(error)):
        return error
    return ClusterError(
        f"the cluster is gone, or does not answer: {failures.one_line(str(error))}",
        where="search",
        fix="call the same command again when it is back: each trial goes on after its last finished epoch",
    )


def error_of(trial: Any) -> BaseException:
    """Return the error that Ray keeps of a trial's last attempt."""
    if trial.pickled_error_file:
        # Written a moment ago, by this very process.
        with open(trial.pickled_error_file, "rb") as file:
            found: BaseException = ray.cloudpickle.load(file)
            return found
    if trial.error_file:
        with open(trial.error_file, encoding="utf-8", errors="replace") as file:
            return RayError(file.read())
    return RayError("Ray does not say why")

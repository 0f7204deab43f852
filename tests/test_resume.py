"""Real training in processes that are really killed: what they leave, a second process brings to the same numbers.

A process is killed at every moment at which something of it reaches the disk, and within epochs, without Ray.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_clean import CPU, PRETRAINED
from test_methods import make_folder, make_pretrained, study_of

from raybd import checkpoint
from raybd.assignment import Assignment, remove_leftovers
from raybd.clean.trial import run_trial
from raybd.errors import SupersededError
from raybd.ledger import Entry, Kind, Ledger
from raybd.records import epoch_rows, pretrain_rows, trial_row
from raybd.store import Store
from raybd.study import Stopping, Study
from raybd.tables import TIMES
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.pretraining import done, pretrain, start_record

pytestmark = pytest.mark.usefixtures("one_thread")
# Draws at random in every step; points without training.
METHODS = ("par", "interpolation")
TASK = Assignment("mmcl-0000", 0, "mmcl", PRETRAINED, {})
KINDS = {"pretraining": Kind.PRETRAIN, **dict.fromkeys(METHODS, Kind.TRIAL)}
IDS = {Kind.PRETRAIN: PRETRAINED, Kind.TRIAL: TASK.trial_id}


class Mortal(Store):
    """A run directory whose process is killed at a moment: each is a file about to be put in place, or just put there.

    Args:
        at: the number of the moment, from 0; None for never.
    """

    def __init__(self, uri: str, *, at: int | None = None) -> None:
        super().__init__(uri)
        self.moments, self._at = 0, at

    def moment(self) -> None:
        """Count; at the moment that was given, be killed."""
        if self.moments == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.moments += 1

    def _write(self, name: str, content: bytes, place: Callable[[Path, Path], None]) -> None:
        if name.startswith("progress/"):
            # At most one a second: their number is not the same each time.
            return super()._write(name, content, place)

        def watched(temporary: Path, target: Path) -> None:
            self.moment()
            place(temporary, target)

        super()._write(name, content, watched)
        self.moment()
        return None


def carry_out(what: str, study: Study, store: Store) -> None:
    """Do what a Ray worker does with a pretraining run or a trial."""
    if KINDS[what] is Kind.TRIAL:
        run_trial(study, store, TASK, device=CPU)
    elif done(store, PRETRAINED) is None:
        record = start_record(study, "mmcl", PRETRAINED)
        attempt = Ledger(store).start(Kind.PRETRAIN, PRETRAINED, record)
        pretrain(study, "mmcl", LedgerContext(store=store, kind=Kind.PRETRAIN, id=PRETRAINED, attempt=attempt))


def in_child(work: Callable[[], None]) -> bool:
    """Do something in a process of its own; return whether it came to its end, rather than being killed."""
    gc.freeze()  # a collection in the child would copy all memory
    with warnings.catch_warnings():
        # Of threads that do not come along: none of them trains here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    gc.unfreeze()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def entry_of(what: str, store: Store) -> Entry:
    return Ledger(store).entry(KINDS[what], IDS[KINDS[what]])


def rows(what: str, store: Store) -> list[dict[str, Any]]:
    """Return the rows of the tables without what differs between two runs: times, and how often it was started."""
    entry = entry_of(what, store)
    found = pretrain_rows(entry) if KINDS[what] is Kind.PRETRAIN else [*epoch_rows(entry), trial_row(entry)]
    return [{name: value for name, value in row.items() if name not in {*TIMES, "attempt"}} for row in found]


def state_epoch(store: Store) -> int:
    """Return the epoch that a run would go on from, -1 at its start."""
    (*_, last) = (-1, *(checkpoint.metadata_of(store.get(name))["epoch"] for name in store.names("state")))
    return int(last)


def weights(store: Store) -> dict[str, bytes]:
    """Return every file of weights that is kept."""
    return {name: store.get(name) for folder in ("weights", "pretrained") for name in store.names(folder)}


def records(store: Store) -> dict[str, bytes]:
    """Return every record of a finished epoch, times and all."""
    return {name: store.get(name) for name in store.names("ledger") if "/epoch-" in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def begun(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a poisoned model."""
    return Path(make_pretrained(folder, tmp_path_factory.mktemp("pretrained")).root)


class Whole:
    """A pretraining run or a trial without a fault, and what a run with faults is compared with.

    Attributes:
        moments: how many it has; steps: how many it takes.
    """

    def __init__(self, what: str, folder: Path, begun: Path, root: Path) -> None:
        self.what, self._begun, self._root = what, begun, root
        study = study_of(folder, **({} if what == "pretraining" else {"method": what}))
        self.study = study.model_copy(update={"pretrain": study.pretrain.model_copy(update={"epochs": 2})})
        inputs_for(self.study)
        store = self.new("whole")
        carry_out(what, self.study, store)
        self.moments = store.moments
        self.steps = entry_of(what, store).epochs[2]["step"]
        self.rows, self.weights = rows(what, store), weights(store)

    def new(self, name: str) -> Mortal:
        """Return a run directory in which this has not begun."""
        if self.what != "pretraining":
            shutil.copytree(self._begun, self._root / name)
        return Mortal(str(self._root / name))

    def check(self, store: Store, before: dict[str, bytes]) -> None:
        """Fail unless a run that ended is this one, and every record is as it was when it was first seen."""
        remove_leftovers(store)
        assert rows(self.what, store) == self.rows
        assert weights(store) == self.weights
        after = records(store)
        assert {name: after[name] for name in before} == before
        assert store.names("state") == store.names("progress") == []
        assert not list(Path(store.root).rglob(".*"))


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, folder: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(request.param, folder, begun, tmp_path_factory.mktemp(request.param))


def test_killed_after_every_file_it_gives_the_same_bits(whole: Whole) -> None:
    """Each attempt brings one file into place, and is killed: weights, state, record of an epoch, end."""
    store, attempts, before = whole.new("every"), 0, {}
    # The first file of an attempt is the record of its start: moments 0 and 1.
    at = 3
    while not in_child(lambda: carry_out(whole.what, whole.study, Mortal(store.root, at=at))):  # noqa: B023
        attempts += 1
        names = [n for n in store.names("") if not n.startswith("progress/") and "/started-" not in n]
        found = {name: store.get(name) for name in names}
        assert [name for name in before if "ledger/" in name and found[name] != before[name]] == []
        if not Ledger(store).has_ended(KINDS[whole.what], entry_of(whole.what, store).id):
            # What is recorded is not done again: the state is of that epoch; the last one needs none.
            recorded = Ledger(store).last_epoch(KINDS[whole.what], entry_of(whole.what, store).id)
            assert state_epoch(store) >= min(recorded, 1)
        # Some files mean nothing without the next one: it comes along.
        at = 3 if found != before else at + 2
        before = found
    assert attempts >= whole.moments // 2 - 1
    whole.check(store, records(store))


def test_killed_at_random_moments_it_gives_the_same_bits(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times each: within an epoch, or at a file that is about to be put in place or is there."""
    dice = random.Random(11)
    for number in range(2):
        store, before = whole.new(f"random-{number}"), {}
        for _ in range(3):
            dying = Mortal(store.root, at=dice.randrange(3, (whole.moments + whole.steps) // 2))
            monkeypatch.setattr(LedgerContext, "progress", lambda self, progress: dying.moment())  # noqa: B023
            in_child(lambda: carry_out(whole.what, whole.study, dying))  # noqa: B023
            before |= {name: content for name, content in records(store).items() if name not in before}
        monkeypatch.undo()
        assert in_child(lambda: carry_out(whole.what, whole.study, store))  # noqa: B023
        whole.check(store, before)


@pytest.mark.parametrize("whole", METHODS, indirect=True)
def test_a_trial_that_waited_at_a_rung_goes_on_to_the_same_bits(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed where it should begin to wait, waits after another attempt, is left alone there, and goes on."""
    store, rung = whole.new("rung"), replace(TASK, until=1)

    def up_to_the_rung() -> None:
        run_trial(whole.study, store, rung, device=CPU)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "pause", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert not in_child(up_to_the_rung)
    before = records(store)
    assert not entry_of(whole.what, store).waits
    for _ in range(2):
        assert in_child(up_to_the_rung)
        entry = entry_of(whole.what, store)
        assert (entry.waits, sorted(entry.epochs), entry.attempts, state_epoch(store)) == (True, [0, 1], 2, 1)
    assert [pause["epoch"] for pause in entry.pauses] == [1]
    assert in_child(lambda: carry_out(whole.what, whole.study, store))
    ended = entry_of(whole.what, store).ended or {}
    assert ended["device_seconds"] > entry.pauses[0]["device_seconds"] > 0
    whole.check(store, before)


def test_a_trial_that_is_stopped_for_what_it_measured_ends_there(
    folder: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def collapse(_: Stopping, epoch: int, points: dict[int, tuple[float, float]]) -> str | None:
        asked.append((epoch, sorted(points)))
        return "it collapsed" if epoch == 1 else None

    monkeypatch.setattr("raybd.stopping.collapse", collapse)
    shutil.copytree(begun, tmp_path / "run")
    store = Store(str(tmp_path / "run"))
    entry = run_trial(study_of(folder, method="mmcl"), store, replace(TASK, until=1), device=CPU)
    assert entry.ended is not None
    assert (entry.ended["state"], entry.ended["stop_reason"]) == ("stopped", "it collapsed")
    assert asked == [(0, [0]), (1, [0, 1])]
    assert trial_row(entry)["epochs_done"] == 1
    assert store.names("state") == []


def test_who_was_thought_dead_writes_nothing_into_what_another_has(whole: Whole) -> None:
    """A first process goes on where a second has been: it stops, and what the second wrote stands."""
    store, first = whole.new("two"), []

    class Slow(Mortal):
        """Lets another process take the run and bring it to its end, once epoch 0 is recorded."""

        def _write(self, name: str, content: bytes, place: Callable[[Path, Path], None]) -> None:
            if name.endswith("epoch-0000.json") and not first:
                super()._write(name, content, place)
                assert in_child(lambda: carry_out(whole.what, whole.study, store))
                first.append(records(store))
            else:
                assert not first or name.startswith("progress/"), name
                super()._write(name, content, place)

    with pytest.raises(SupersededError, match="attempt 1 counts no more"):
        carry_out(whole.what, whole.study, Slow(store.root))
    whole.check(store, first[0])

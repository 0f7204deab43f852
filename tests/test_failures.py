"""What is a failure of which kind, whether a trial is tried again, and what a driver makes of what Ray tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError, RaySystemError, RayTaskError

from raybd import failures
from raybd.assignment import Assignment, settle, start_record
from raybd.cluster.faults import Faults
from raybd.errors import ClusterError, DataError, NonFiniteError, StorageError, TrialError
from raybd.ledger import Entry, Kind, Ledger
from raybd.store import Store
from raybd.study import Failure, Search, Study

STUDY = Study.model_validate({"name": "made", "poison": {"num_poisoned": 1}})
TASK = Assignment("mmcl-0003", 3, "mmcl", "mmcl-aaaa", {})
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
\tactor_id: dc53d8513d47442fd9cf002f01000000
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by the OOM killer due to high memory usage, (2) ray stop --force was called"""
MACHINE_GONE = """The actor died unexpectedly before finishing this task.
\tactor_id: b4fe2587efbce9dac7a91cf501000000
The actor died because its node has died. Node Id: 94d9d5e56adbc123585aa2f5a080e2efb75a3258d797d9d304832e3c
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""
OUT_OF_MEMORY = """4 worker(s) were killed due to the node running low on memory.
Considered workers: [
Selected to kill: (Actor(2372b9ee99565acd9fed2fb601000000): job ID=01000000, task name=ImplicitFunc.__init__, pid=25144)
Considered: (Actor(ffffffff99565acd9fed2fb601000000): job ID=01000000)]"""


def actor_died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    return error


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("train", "Traceback: made", cause, "ray::made", 1, "127.0.0.1")


# Kinds and messages.


def an_error_of(act: Any) -> BaseException:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteError("loss is nan"), Failure.NON_FINITE),
        (TrialError("something else"), Failure.ERROR),
        (MemoryError(), Failure.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), Failure.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), Failure.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Failure.OUT_OF_MEMORY),
        (OSError(12, "Cannot allocate memory"), Failure.OUT_OF_MEMORY),
        (DataError("captions that say out of memory"), Failure.ERROR),
        (ZeroDivisionError("division by zero"), Failure.ERROR),
    ],
)
def test_kinds_of_errors(error: BaseException, kind: Failure) -> None:
    assert failures.kind_of(error) is kind


def test_what_torch_says_of_a_host_without_memory_is_known() -> None:
    error = an_error_of(lambda: torch.empty(2**50, dtype=torch.uint8))
    assert failures.kind_of(error) is Failure.OUT_OF_MEMORY
    assert "\n" not in failures.message_of(error)


def test_messages_are_one_line() -> None:
    assert failures.message_of(DataError("a shard is broken", where="s.tar")) == "a shard is broken"
    assert failures.message_of(ValueError("\n  first\nsecond")) == "ValueError: first"
    assert failures.message_of(KeyError()) == "KeyError"
    assert len(failures.message_of(ValueError("x" * 9000))) < 600


# Whether a trial is tried again.


def entry_with(*found: tuple[str, int | None]) -> Entry:
    records = tuple({"kind": kind, "message": "", "epoch": epoch} for kind, epoch in found)
    return Entry("t", {}, len(found), {}, None, records)


@pytest.mark.parametrize(
    ("found", "retries", "final"),
    [
        ([("died", None)], 1, False),
        ([("died", None), ("died", None)], 1, True),
        ([("died", None), ("hung", None)], 1, True),
        ([("died", None), ("died", 0)], 1, False),  # it got on: counted anew
        ([("died", 0), ("died", 1), ("died", 2), ("died", 3)], 1, False),
        ([("died", 1), ("died", 2), ("died", 2)], 1, True),
        ([("died", 1), ("died", 2), ("died", 2)], 2, False),
        ([("died", None)], 0, True),
        ([("non_finite", 4)], 9, True),
        ([("settings", None)], 9, True),
        ([("out_of_memory", 1)], 1, False),
    ],
)
def test_who_is_tried_again(found: list[tuple[str, int | None]], retries: int, final: object) -> None:
    assert failures.is_final(entry_with(*found), Search(retries=retries)) is final


def test_the_study_says_what_is_tried_again() -> None:
    only_hung = Search(retries=3, retry_on=["hung"])
    assert not failures.is_final(entry_with(("hung", 1)), only_hung)
    assert failures.is_final(entry_with(("died", 1)), only_hung)
    assert not failures.is_final(entry_with(("non_finite", 1)), Search(retry_on=["non_finite"]))
    with pytest.raises(ValidationError, match="never will"):
        Search(retry_on=["settings"])
    changed = STUDY.model_copy(update={"search": Search(retries=7, retry_on=())})
    assert changed.hash() == STUDY.hash()


def test_reasons_that_differ_in_numbers_alone_are_one() -> None:
    found = failures.reasons(
        [
            ("a", "non_finite", "loss is nan at step 12 (epoch 3, lr 1e+30)"),
            ("b", "died", "its process died"),
            ("c", "non_finite", "loss is nan at step 4 (epoch 1, lr 3.5e-05)"),
            ("d", "error", "loss is nan at step 4 (epoch 1, lr 3.5e-05)"),
            ("e", "non_finite", "loss is inf at step 4 (epoch 1, lr 3.5e-05)"),
            ("f", None, None),
            ("g", "non_finite", "loss is nan at step 0 (epoch 1, lr 10)"),
            ("h", "non_finite", "loss is nan at step 0 (epoch 1, lr 11)"),
        ]
    )
    assert [(reason.kind, reason.trial_ids) for reason in found] == [
        ("non_finite", ("a", "c", "g", "h")),
        ("died", ("b",)),
        ("error", ("d",)),
        ("non_finite", ("e",)),
        ("unknown", ("f",)),
    ]
    assert str(found[0]) == "4 x non_finite: loss is nan at step 12 (epoch 3, lr 1e+30) (a, c, g, …)"


@pytest.mark.parametrize(
    ("planned", "failed", "complete", "most", "stops"),
    [
        (10, 5, 0, 0.5, False),
        (10, 6, 0, 0.5, True),
        (10, 6, 4, 0.5, False),  # nothing is left to stop
        (4, 3, 0, 0.5, False),  # so few say little
        (6, 5, 0, 0.5, True),
        (100, 5, 0, 0.01, True),
        (100, 99, 0, 1.0, False),
    ],
)
def test_how_many_failures_end_a_search(
    store: Store, planned: int, failed: int, complete: int, most: float, stops: object
) -> None:
    study = STUDY.model_copy(update={"search": Search(max_failed=most)})
    end = {"state": "failed", "error_type": "died", "error_message": "killed"}
    entries = [Entry(f"f{number}", {}, 1, {}, end) for number in range(failed)]
    entries += [Entry(f"c{number}", {}, 1, {}, {"state": "complete"}) for number in range(complete)]
    entries.append(Entry("open", {}, 1, {}, None))
    faults = Faults(study, store, entries, planned=planned, on_end=lambda entry: None)
    faults.guard(faults.check_share)
    assert isinstance(faults.error, TrialError) is stops
    if stops:
        assert f"{failed} of {planned} planned trials failed" in str(faults.error)
        assert f"most often {failed} x died: killed (f0, f1, f2, …)" in str(faults.error)


def test_a_share_of_failures_must_be_one() -> None:
    for wrong in (0, -0.1, 1.1):
        with pytest.raises(ValidationError, match="max_failed"):
            Search(max_failed=wrong)


# What a driver makes of faults.


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def faults_of(store: Store) -> Faults:
    return Faults(STUDY, store, Ledger(store).entries(Kind.TRIAL), planned=9, on_end=lambda entry: None)


def start(store: Store) -> None:
    Ledger(store).start(Kind.TRIAL, TASK.trial_id, start_record(STUDY, TASK))


def test_a_worker_that_dies_twice_at_the_same_place_is_over(store: Store) -> None:
    faults = faults_of(store)
    assert not faults.is_over(TASK, actor_died(DIED))  # before it could say that it had started
    start(store)
    assert faults.is_over(TASK, actor_died(DIED))
    entry = faults.settled(TASK)
    assert entry is not None
    assert entry.ended is not None
    assert (entry.ended["error_type"], entry.attempts, len(entry.failures)) == ("died", 2, 2)
    words = "its process died: Worker unexpectedly exits with a connection error code 2 (SYSTEM_ERROR)"
    assert entry.ended["error_message"] == words
    assert store.get("errors/mmcl-0003.txt").decode().count("actor_id: dc53d8513d47442fd9cf002f01000000") == 2


def test_a_worker_that_gets_on_between_two_deaths_is_not(store: Store) -> None:
    faults = faults_of(store)
    start(store)
    for epoch in range(5):
        assert not faults.is_over(TASK, actor_died(DIED))
        Ledger(store).epoch(Kind.TRIAL, TASK.trial_id, epoch, {})


@pytest.mark.parametrize("error", [actor_died(MACHINE_GONE), RayActorError(preempted=True)])
def test_the_death_of_a_machine_does_not_count(store: Store, error: RayActorError) -> None:
    faults = faults_of(store)
    start(store)
    for _ in range(5):
        assert not faults.is_over(TASK, error)
    assert Ledger(store).entry(Kind.TRIAL, TASK.trial_id).failures == ()


def test_what_the_worker_recorded_is_not_counted_twice(store: Store) -> None:
    start(store)
    failures.note(store, TASK.trial_id, Failure.DIED, "of an earlier call", trace="")
    faults = faults_of(store)
    Ledger(store).epoch(Kind.TRIAL, TASK.trial_id, 0, {})
    failures.note(store, TASK.trial_id, Failure.HUNG, "no step for 30 minutes", trace="")
    assert not faults.is_over(TASK, actor_died(DIED))
    assert [found["kind"] for found in Ledger(store).entry(Kind.TRIAL, TASK.trial_id).failures] == ["died", "hung"]
    assert faults.is_over(TASK, actor_died(DIED))


def test_a_failure_noted_as_its_machine_went_hides_no_later_one(store: Store) -> None:
    faults = faults_of(store)
    start(store)
    failures.note(store, TASK.trial_id, Failure.OUT_OF_MEMORY, "no memory left", trace="")
    assert not faults.is_over(TASK, actor_died(MACHINE_GONE))
    assert faults.is_over(TASK, actor_died(DIED))
    kinds = [found["kind"] for found in Ledger(store).entry(Kind.TRIAL, TASK.trial_id).failures]
    assert kinds == ["out_of_memory", "died"]


def at_a_rung(store: Store) -> Assignment:
    task = replace(TASK, until=1)
    Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(STUDY, task))
    Ledger(store).epoch(Kind.TRIAL, task.trial_id, 1, {})
    Ledger(store).pause(Kind.TRIAL, task.trial_id, {"epoch": 1, "device_seconds": 1.0})
    return task


def test_a_process_that_dies_once_its_trial_waits_is_no_failure_of_it(store: Store) -> None:
    faults, task = faults_of(store), at_a_rung(store)
    assert faults.is_over(task, actor_died(DIED))
    entry = faults.settled(task)
    assert entry is not None
    assert (entry.waits, entry.failures) == (True, ())


def test_what_befalls_an_idle_process_is_no_failure_of_the_trial_that_it_had(store: Store) -> None:
    """Ray's out-of-memory killer names actors, those too that are kept for a next trial."""
    told: list[str] = []
    faults = Faults(STUDY, store, [], planned=9, on_end=lambda entry: told.append(entry.id))
    faults.started(replace(TASK, until=1), "Actor(ImplicitFunc, 2372b9ee99565acd9fed2fb601000000)")
    faults.ended(at_a_rung(store))
    error = RuntimeError(f"Caught unexpected exception: {OUT_OF_MEMORY}")
    error.__cause__ = OutOfMemoryError(OUT_OF_MEMORY)
    # It has gone on meanwhile, in another process.
    Ledger(store).start(Kind.TRIAL, TASK.trial_id, start_record(STUDY, TASK))
    faults.broke_off(error)
    entry = Ledger(store).entry(Kind.TRIAL, TASK.trial_id)
    assert (entry.ended, entry.failures, told) == (None, (), [TASK.trial_id])


def test_an_ended_trial_whose_process_is_given_up_is_over(store: Store) -> None:
    start(store)
    settle(store, STUDY, TASK, reason=(Failure.ERROR, "made"))
    assert faults_of(store).is_over(TASK, task_error(TrialError("this process is not used again")))
    assert Ledger(store).entry(Kind.TRIAL, TASK.trial_id).failures == ()


def test_an_error_that_the_worker_could_not_record_is_recorded_by_the_driver(store: Store) -> None:
    start(store)
    assert not faults_of(store).is_over(TASK, task_error(ImportError("no such module")))
    (found,) = Ledger(store).entry(Kind.TRIAL, TASK.trial_id).failures
    assert (found["kind"], found["message"]) == ("error", "ImportError: no such module")


def test_a_fault_of_the_storage_ends_the_search_and_leaves_the_trial_open(store: Store) -> None:
    faults = faults_of(store)
    start(store)
    error = task_error(StorageError("the disk is full"))
    assert faults.guard(lambda: faults.is_over(TASK, error)) is None
    assert isinstance(faults.error, StorageError)
    assert faults.error.exit_code == 3
    assert faults.settled(TASK) is None  # nothing is written any more
    entry = Ledger(store).entry(Kind.TRIAL, TASK.trial_id)
    assert (entry.ended, entry.failures) == (None, ())


def test_a_ledger_that_cannot_be_written_is_no_failure_of_a_trial(store: Store, monkeypatch: Any) -> None:
    faults = faults_of(store)
    start(store)

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_new", full)
        faults.ended(TASK)
        assert faults.settled(TASK) is None
    assert isinstance(faults.error, StorageError)
    assert Ledger(store).entry(Kind.TRIAL, TASK.trial_id).ended is None


def test_rays_out_of_memory_killer_is_told_from_other_deaths(store: Store) -> None:
    """Tune gives the whole search up then: those that were killed are noted, and the search goes on."""
    faults = faults_of(store)
    start(store)
    other = Assignment("mmcl-0004", 4, "mmcl", "mmcl-aaaa", {})
    faults.started(TASK, "Actor(ImplicitFunc, 2372b9ee99565acd9fed2fb601000000)")
    faults.started(other, "Actor(ImplicitFunc, ffffffff99565acd9fed2fb601000000)")
    error = RuntimeError(f"Caught unexpected exception: {OUT_OF_MEMORY}")
    error.__cause__ = OutOfMemoryError(OUT_OF_MEMORY)
    faults.broke_off(error)
    (entry,) = Ledger(store).entries(Kind.TRIAL)
    assert [(found["kind"], entry.id) for found in entry.failures] == [("out_of_memory", TASK.trial_id)]
    assert (entry.ended, faults.error) == (None, None)
    faults.broke_off(error)  # and again: nobody but this one could end it
    (entry,) = Ledger(store).entries(Kind.TRIAL)
    assert entry.ended is not None
    assert entry.ended["error_type"] == "out_of_memory"


def test_an_actor_that_ran_out_of_memory_before_it_started_is_told_by_its_text(store: Store) -> None:
    start(store)
    faults_of(store).is_over(TASK, RayError(f"Failure # 1 (occurred at …)\n{OUT_OF_MEMORY}"))
    (entry,) = Ledger(store).entries(Kind.TRIAL)
    assert [found["kind"] for found in entry.failures] == ["out_of_memory"]


def test_a_cluster_that_is_gone_is_an_error_of_its_own(store: Store) -> None:
    error = RuntimeError("Caught unexpected exception: gone")
    error.__cause__ = RaySystemError("the GCS does not answer")
    with pytest.raises(ClusterError, match="is gone, or does not answer") as caught:
        faults_of(store).broke_off(error)
    assert caught.value.exit_code == 3
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no fault of the cluster
        faults_of(store).broke_off(ZeroDivisionError())

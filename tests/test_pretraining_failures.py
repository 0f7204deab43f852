"""What a pretraining worker makes of an error: a failure of the run's own, or of something beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from raybd.cluster.gloo import _meet_on_rays_network, interface_of, warn_of_unknown
from raybd.cluster.pretrain import _failures, _is_open, _note
from raybd.errors import DataError, NonFiniteError, SupersededError
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from raybd.train.context import LedgerContext


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    Ledger(store).start(Kind.PRETRAIN, "p", {})
    return store


def context(store: Store, *, rank: int, world_size: int) -> LedgerContext:
    attempt = 1 if rank == 0 else None
    return LedgerContext(store=store, kind=Kind.PRETRAIN, id="p", attempt=attempt, rank=rank, world_size=world_size)


@pytest.mark.parametrize(
    ("error", "rank", "world_size", "noted", "raised"),
    [
        (NonFiniteError("loss is nan"), 0, 1, "non_finite: loss is nan", False),
        (KeyError("x"), 0, 1, "error: KeyError: 'x'", False),
        # All ranks have the same loss: the first one notes it, and the next objective is begun.
        (NonFiniteError("loss is nan"), 0, 2, "non_finite: loss is nan", False),
        (NonFiniteError("loss is nan"), 1, 2, None, False),
        # One rank has it: the others wait for it until their group is ended.
        (DataError("a broken shard"), 1, 2, "error: a broken shard", True),
        (RuntimeError("CUDA out of memory"), 1, 2, "out_of_memory: RuntimeError: CUDA out of memory", True),
        # Most likely another rank died: no failure of the run.
        (RuntimeError("connection closed by peer"), 0, 2, None, True),
        # A machine with one of Ray's own actors went.
        (ActorDiedError(), 0, 1, None, True),
    ],
)
def test_a_failure_of_its_own_is_noted_and_that_of_a_peer_is_not(
    error: Exception,
    rank: int,
    world_size: int,
    noted: str | None,
    raised: bool,  # noqa: FBT001
    store: Store,
) -> None:
    here = context(store, rank=rank, world_size=world_size)
    if raised:
        with pytest.raises(type(error)):
            _note(error, here)
    else:
        _note(error, here)
    found = [f"{failure['kind']}: {failure['message']}" for failure in _failures(store, "p")]
    assert found == ([noted] if noted else [])
    assert store.names("errors") == ([f"errors/p-rank{rank}.txt" if rank else "errors/p.txt"] if noted else [])
    # Failed in this call it is left alone; the next call tries it again.
    assert _is_open(store, "p", 0) is not bool(noted)
    assert _is_open(store, "p", len(found))


def test_a_failure_of_a_worker_that_was_thought_dead_is_not_noted(store: Store) -> None:
    here = context(store, rank=0, world_size=1)
    Ledger(store).start(Kind.PRETRAIN, "p", {})
    with pytest.raises(SupersededError):
        _note(DataError("x"), here)
    assert _failures(store, "p") == ()


def test_what_never_started_has_not_failed(store: Store) -> None:
    assert _failures(store, "q") == ()
    assert _is_open(store, "q", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_workers_meet_on_the_network_that_ray_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    for given, used in ((None, "lo"), ("mine0", "mine0")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
        if given is None:
            monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        assert _meet_on_rays_network() == ("127.0.0.1", used)
        assert os.environ["GLOO_SOCKET_IFNAME"] == used


def test_an_address_without_an_interface_is_named_where_there_are_several_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr("raybd.cluster.gloo.log.warning", lambda form, *values: said.append(form % values))
    warn_of_unknown([("10.0.0.1", None), ("10.0.0.1", None)])
    warn_of_unknown([("10.0.0.1", "eth0"), ("10.0.0.2", "eth0")])
    assert said == []
    warn_of_unknown([("10.0.0.1", "eth0"), ("10.0.0.2", None)])
    assert len(said) == 1
    assert "10.0.0.2" in said[0]
    assert "GLOO_SOCKET_IFNAME" in said[0]

"""Streamed pairs from epoch to epoch: workers that stay and read ahead give what new ones would have given."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_data import SHARD_SIZES, SIZE, TOTAL, images, indexed, poisoned, prepare, sample, shard, source, urls
from torch import Tensor

from raybd.data import cache, streaming
from raybd.data.pairs import Batch
from raybd.data.shards import RawSample
from raybd.data.streaming import StreamedPairs
from raybd.errors import DataError

__all__ = ["images", "urls"]
SECONDS = 60


def everything(batches: Iterator[Batch]) -> list[tuple[object, ...]]:
    """Return all that there is of batches, in their order."""
    return [
        tuple(value.numpy().tobytes() if isinstance(value, Tensor) else value for value in vars(batch).values())
        for batch in batches
    ]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the epochs for which readers were made, first and last, as they come."""
    found: list[tuple[int, int]] = []
    make = streaming._items

    def noted(stream: streaming._Stream, **how: int) -> Iterator[streaming._Item]:
        found.append((stream._wanted.epoch, stream._wanted.last))
        return make(stream, **how)

    monkeypatch.setattr(streaming, "_items", noted)
    return found


@pytest.mark.parametrize("buffer", [1, 5, TOTAL, 100])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_epochs_in_turn_are_those_that_are_read_one_by_one(
    images: cache.Images,
    begun: list[tuple[int, int]],
    buffer: int,
    rank: int,
    world_size: int,
) -> None:
    plan, part = poisoned(images), {"batch_size": 6, "rank": rank, "world_size": world_size}
    pairs = source("streamed", images, TOTAL, prepare(plan, augment=True), buffer=buffer)
    in_turn = [everything(pairs.epoch(epoch, **part, last=5)) for epoch in (2, 3, 4, 5)]
    assert begun == [(2, 5)]
    one_by_one = [everything(pairs.epoch(epoch, **part)) for epoch in (2, 3, 4, 5)]
    assert begun[1:] == [(epoch, epoch) for epoch in (2, 3, 4, 5)]
    assert in_turn == one_by_one


def test_another_epoch_than_the_next_or_one_left_half_way_is_read_anew(
    images: cache.Images,
    begun: list[tuple[int, int]],
) -> None:
    pairs = source("streamed", images, TOTAL, prepare(augment=True), buffer=5)
    alone = {epoch: everything(pairs.epoch(epoch, batch_size=6)) for epoch in range(4)}
    begun.clear()
    assert everything(pairs.epoch(0, batch_size=6, last=3)) == alone[0]
    assert everything(pairs.epoch(2, batch_size=6, last=3)) == alone[2]
    half = pairs.epoch(3, batch_size=6, last=4)
    next(half)
    half.close()
    assert everything(pairs.epoch(3, batch_size=6, last=3)) == alone[3]
    assert everything(pairs.epoch(1, batch_size=6)) == alone[1]
    assert begun == [(0, 3), (2, 3), (3, 4), (3, 3), (1, 1)]


def test_the_next_epoch_is_read_while_this_one_leaves_the_buffer(
    images: cache.Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = 0
    decode = streaming.decode

    def counted(content: bytes, size: int) -> object:
        nonlocal read
        read += 1
        return decode(content, size)

    monkeypatch.setattr(streaming, "decode", counted)
    monkeypatch.setattr(streaming, "_CHUNK", 1)
    pairs = source("streamed", images, TOTAL, prepare(), buffer=8)
    before = []
    for epoch in (1, 2, 3):
        for batch in pairs.epoch(epoch, batch_size=1, last=3):
            before.append(read)
            assert len(batch.keys) == 1
    # Never more than the buffer is held, and from the first sample on to the last epoch's end it is full.
    assert before == [min(place + 8, 3 * TOTAL) for place in range(3 * TOTAL)]


@pytest.mark.parametrize("good", [0, 2])
def test_a_shard_that_breaks_is_told_in_the_epoch_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    """It is noticed in the epoch before, after some good samples; the epoch can be asked for again."""
    url = shard(tmp_path / "a.tar", {f"k{i}": sample(i) for i in range(3)})
    pairs = StreamedPairs(indexed([url]), prepare(), size=SIZE, workers=0, shuffle_buffer=4)
    alone = [everything(pairs.epoch(epoch, batch_size=1)) for epoch in range(2)]
    whole, calls = streaming.samples, itertools.count()

    def breaking(url: str) -> Iterator[RawSample]:
        second = next(calls) == 1
        yield from itertools.islice(whole(url), good if second else None)
        if second:
            raise DataError("shard cannot be read", where=url)

    monkeypatch.setattr(streaming, "samples", breaking)
    assert everything(pairs.epoch(0, batch_size=1, last=2)) == alone[0]
    assert next(calls) == 2
    with pytest.raises(DataError, match="shard cannot be read") as caught:
        list(pairs.epoch(1, batch_size=1, last=2))
    assert caught.value.where == url
    assert everything(pairs.epoch(1, batch_size=1, last=2)) == alone[1]


def test_what_goes_to_a_worker_has_neither_captions_nor_their_tokens(images: cache.Images) -> None:
    pairs = source("streamed", images, TOTAL, prepare())
    wanted = streaming._Wanted(0, 0, 0, TOTAL, views=True)
    state = streaming._Stream(pairs._index, pairs._prepare, SIZE, 4, wanted).__getstate__()
    assert len(state["_index"]) == TOTAL == sum(SHARD_SIZES)
    assert len(state["_index"].captions) == 0
    with pytest.raises(NotImplementedError):
        state["_prepare"].tokenize(["a dog"])


def busy(pid: int) -> int:
    """Return the CPU time of a process, in ticks."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks in /proc whether a worker is idle")
def test_while_a_step_is_taken_a_whole_batch_is_read_for_the_next(tmp_path: Path) -> None:
    made = [shard(tmp_path / f"{n:02}.tar", {f"{n:02}{i:02}": sample(i) for i in range(20)}) for n in range(30)]
    before = {child.pid for child in multiprocessing.active_children()}
    pairs = StreamedPairs(indexed(made), prepare(), size=SIZE, workers=1, shuffle_buffer=1)
    batches = pairs.epoch(1, batch_size=300)
    first = next(batches)
    (worker,) = {child.pid for child in multiprocessing.active_children()} - before
    assert worker is not None
    deadline, spent, idle = time.monotonic() + SECONDS, -1, 0
    while idle < 4:  # one that others keep waiting looks idle, too
        assert time.monotonic() < deadline
        idle, spent = (0 if busy(worker) > spent else idle + 1), busy(worker)
        time.sleep(0.5)
    for path in tmp_path.glob("*.tar"):  # what was not read by now never is
        path.unlink()
    (second,) = batches
    assert len(first.keys) == len(second.keys) == 300


def below(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in found.read_text().split()] if found.exists() else []
    return children + [pid for child in children for pid in below(child)]


def alive(pid: int) -> bool:
    """Say whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_stay_for_all_epochs_give_the_same_and_outlive_no_kill(tmp_path: Path) -> None:
    """Nor does the process outlive it that they are forked from."""
    made = [shard(tmp_path / f"{name}.tar", {f"{name}{i}": sample(i) for i in range(9)}) for name in "abc"]
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, sys, time
            import torch
            sys.path.insert(0, {str(Path(__file__).parent)!r})

            def main():
                from test_data import SIZE, indexed, prepare
                from test_streaming import everything
                from raybd.data.streaming import StreamedPairs

                torch.set_num_threads(1)
                index = indexed({made!r})
                made = [StreamedPairs(index, prepare(augment=True), size=SIZE, workers=2, shuffle_buffer=4)
                        for _ in range(2)]
                kept, again = made
                epochs, pids = [], []
                for epoch in (1, 2):
                    epochs.append(everything(kept.epoch(epoch, batch_size=6, last=20)))  # more than is read ahead
                    pids.append(sorted(child.pid for child in multiprocessing.active_children()))
                assert pids[0] == pids[1] and len(pids[0]) == 2, pids
                assert everything(again.epoch(2, batch_size=6)) == epochs[1]
                assert sorted(child.pid for child in multiprocessing.active_children()) == pids[0]
                print(*pids[0], flush=True)
                time.sleep(600)

            if __name__ == "__main__":
                main()
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        assert all(alive(pid) for pid in workers)
        everyone = below(process.pid)
        assert set(workers) <= set(everyone)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    deadline = time.monotonic() + SECONDS
    while left := [pid for pid in everyone if alive(pid)]:
        assert time.monotonic() < deadline, f"{left} outlived the trainer by {SECONDS} s"
        time.sleep(0.2)

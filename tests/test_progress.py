"""How far a search is, on screens of any size: best points, hypervolume against trials, device-hours."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from raybd import fronts
from raybd.console import _Picture
from raybd.ledger import State
from raybd.report import progress
from raybd.report.progress import Meter, Progress, SearchState
from raybd.study import Stopping

SAME = {"study": "s", "study_hash": "h", "pretrain_id": "p", "objective": "mmcl", "method": "cleanclip", "alpha": None}


def trial(number: int, state: str = "complete", **more: Any) -> dict[str, Any]:
    ended = None if state == State.RUNNING else datetime(2026, 1, 1, 0, number, tzinfo=UTC)
    known = {"epochs_planned": 10, "epochs_done": 10, "device_seconds": 360.0}
    return {**SAME, "trial_id": f"t{number}", "number": number, "state": state, "ended": ended, **known, **more}


def rows(number: int, *points: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {
            **SAME,
            "trial_id": f"t{number}",
            "epoch": n,
            "split": split,
            "zeroshot_top1": top1,
            "asr_top1": asr,
            "loss": 0.1,
        }
        for n, (top1, asr) in enumerate(points)
        for split in ("search", "report")
    ]


BEFORE = (0.6, 0.95)


def test_hypervolumes_after_each_trial_are_those_of_the_fronts_then() -> None:
    draw = random.Random(0)
    trials = [trial(n) for n in range(6)]
    epochs = {f"t{n}": rows(n, BEFORE, *((draw.random(), draw.random()) for _ in range(3))) for n in range(6)}
    found = progress.areas(reversed(trials), epochs)["mmcl", "p"]
    assert [name for name, _ in found] == [f"t{n}" for n in range(6)]
    for n, (_, area) in enumerate(found):
        some = [row for each in range(n + 1) for row in epochs[f"t{each}"]]
        (state,) = progress.search_states(fronts.compute(some, trials[: n + 1]))
        assert state.areas == [pytest.approx(area, abs=1e-12)]
    # One that waits at a rung counts with the last that ended; before there is a point there is nothing to show.
    epochs["t6"] = rows(6, BEFORE, (1.0, 0.0))
    assert progress.areas([*trials, trial(6, "running")], epochs)["mmcl", "p"][-1] == ("t5", 1.0)
    assert progress.areas([trial(0, "failed"), trial(1)], {"t1": epochs["t1"]})["mmcl", "p"] == [
        ("t1", pytest.approx(progress.areas([trial(1)], epochs)["mmcl", "p"][0][1]))
    ]


def test_best_points_are_those_within_some_points_of_accuracy() -> None:
    epochs = rows(0, BEFORE, (0.595, 0.4), (0.575, 0.1), (0.4, 0.0))
    (state,) = progress.search_states(fronts.compute(epochs, [trial(0)]))
    assert state.before == BEFORE
    assert state.best == {1: ("t0:1", 0.595, 0.4), 3: ("t0:2", 0.575, 0.1)}
    assert progress.best_words(state).endswith("best ASR within 3 points 10.00 %")


def test_device_seconds_left_go_by_epochs_and_rungs() -> None:
    meter = Meter(Stopping(), 4, 2)
    assert meter.left() is None
    assert progress.device_line(meter) == ""
    meter.add(trial(0))
    meter.add(trial(1, "stopped", epochs_done=2, device_seconds=72.0))  # it collapsed: nothing more comes of it
    assert meter.left() == pytest.approx(6 * 10 * 36)
    assert progress.device_line(meter) == "device-hours of trials: 0.12 used, about 0.60 left"
    many = Meter(Stopping(rungs=(1,), keep=0.5), 10**12, 2, seconds=1.0, _epochs=1, _planned=10, _ended=1)
    assert many.left() == 11 * 10**12 - 1
    halving = Meter(Stopping(rungs=(1,), keep=0.5), 4, 1)
    for n in range(4):
        halving.add(trial(n, "running", epochs_done=1, device_seconds=None), waited=36.0)
    assert halving.seconds == 4 * 36
    assert halving.left() == pytest.approx(2 * 9 * 36)  # two go on
    halving.add(trial(0))  # one of them has
    assert (halving.seconds, halving.left()) == (pytest.approx(13 * 36), pytest.approx(9 * 36))
    assert Meter(Stopping(), None, 1, seconds=1.0).left() is None


@pytest.mark.parametrize("unicode", [True, False])
def test_a_plot_rises_from_its_lowest_value_to_its_highest(unicode: bool) -> None:  # noqa: FBT001
    lines = progress.plot([i / 100 for i in range(100)], width=20, rows=4, unicode=unicode)
    assert [len(line) for line in lines] == [20] * 4
    empty = "\u2800" if unicode else " "
    assert lines[0].lstrip(empty) != ""
    assert lines[0].startswith(empty * 10)
    assert lines[3].endswith(empty * 10)
    assert all(line.isascii() for line in lines) != unicode
    # One value, and the same value again and again.
    for values in ([0.5], [0.5] * 7):
        flat = progress.plot(values, width=5, rows=2, unicode=unicode)
        assert flat[0] == empty * 5
        assert empty not in flat[1]


def made(failed: int = 2) -> Progress:
    searches = {
        name: SearchState(name, ("", ""), BEFORE, {1: ("mmcl-0003:7", 0.59, 0.1)}, [n / 50 for n in range(1, 40)])
        for name in ("mmcl", "mmcl_ssl")
    }
    found = Progress(60, searches, Meter(Stopping(), 30, 2), {"complete": 37, "failed": failed})
    found.meter.add(trial(0))
    found.running = {f"mmcl-{n:04d}": n for n in range(40, 48)}
    found.seconds, found.seconds_left = 75.0, 30.0
    found.failed = [(f"t{n}", "out_of_memory", f"no room\nfor {n} GiB " + "x" * 300) for n in range(failed)]
    return found


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [2, 5, 10, 15, 24, 50])
def test_a_live_view_fits_its_screen(width: int, height: int) -> None:
    for unicode in (True, False):
        lines = progress.screen(made(), width=width, height=height, unicode=unicode)
        assert len(lines) <= height
        assert max(map(cell_len, lines)) <= width
        assert not any("\n" in line for line in lines)
        assert unicode or all(line.isascii() for line in lines)
        assert lines[0].startswith("search: 39/60 trials")


def test_a_live_view_says_what_there_is() -> None:
    text = "\n".join(progress.screen(made(), width=120, height=40, unicode=True))
    assert "search: 39/60 trials ended, 1 min 15 s, about 30 s left" in text
    assert "trials: 37 complete, 2 failed, 8 running, 13 to come" in text
    assert "device-hours of trials: 0.10 used, about" in text
    assert "2 x out_of_memory: no room" in text
    assert "running: mmcl-0040 epoch 40" in text
    assert text.count("hypervolume 0.7800 after 39 trials") == 2  # side by side
    assert any(line.count("0.7800┤") == 2 for line in text.splitlines())


def test_reasons_are_looked_for_again_where_more_trials_failed() -> None:
    found = made()
    assert found.reasons() is found.reasons()
    found.failed.append(("t9", "hung", "no sign of life"))
    assert [reason.kind for reason in found.reasons()] == ["out_of_memory", "hung"]


def test_a_picture_that_cannot_be_drawn_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raybd.console._LOOK_SECONDS", 0.0)
    lines: list[list[str]] = [["before"]]
    picture = _Picture(Console(width=80, height=20), lambda width, height: lines.pop())
    assert [picture().plain for _ in range(2)] == ["before", "before"]

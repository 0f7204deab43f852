"""Fronts of a run that grows: at every moment those of all its points, though most of them are forgotten."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from raybd import fronts
from raybd.growing_fronts import GrowingFronts

# Few values, so that many points are equal.
rates = st.integers(0, 5).map(lambda n: n / 5)
scores = st.tuples(rates, rates)
trials = st.fixed_dictionaries(
    {
        "method": st.sampled_from(("cleanclip", "par")),
        "objective": st.sampled_from(("mmcl", "mmcl_ssl")),
        "halves": st.lists(st.tuples(scores, scores), min_size=1, max_size=5),
        "state": st.sampled_from(("complete", "failed", "stopped")),
        "mixed": st.booleans(),
        "waits_at": st.none() | st.integers(0, 3),
    }
)


def rows_of(number: int, trial: dict[str, Any], *, last: int | None = None) -> tuple[list[dict[str, Any]], Any]:
    """Return the rows of a trial in both tables; those of one that goes on end with an epoch."""
    name, own = f"t-{number}", {"objective": trial["objective"], "method": trial["method"]}
    points = trial["halves"][: None if last is None else last + 1]
    epochs = [
        {
            **own,
            "study": "demo",
            "study_hash": "abc",
            "pretrain_id": f"{trial['objective']}-1",
            "trial_id": name,
            "epoch": epoch,
            # The last point of some is made without training.
            "alpha": 0.5 if trial["mixed"] and epoch == len(trial["halves"]) - 1 and epoch else None,
            "split": split,
            "zeroshot_top1": top1,
            "asr_top1": asr,
        }
        for epoch, halves in enumerate(points)
        for split, (top1, asr) in zip(fronts.HALVES, halves, strict=True)
    ]
    return epochs, {**own, "trial_id": name, "number": number, "state": trial["state"] if last is None else "running"}


def plain(rows: list[dict[str, Any]]) -> list[str]:
    return [repr(row) for row in rows]  # as text a NaN is equal to another


@settings(max_examples=40)
@given(st.lists(trials, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_at_every_moment_they_are_those_of_all_points(found: list[dict[str, Any]], order: random.Random) -> None:
    arrivals = [(number, None) for number in range(len(found))]
    order.shuffle(arrivals)
    for number, trial in enumerate(found):
        if trial["waits_at"] is not None:
            arrivals.insert(order.randint(0, arrivals.index((number, None))), (number, trial["waits_at"]))
    growing, everything = GrowingFronts(), dict[int, Any]()
    for number, last in arrivals:
        everything[number] = rows_of(number, found[number], last=last)
        growing.add(*everything[number])
        epochs = [row for rows, _ in everything.values() for row in rows]
        assert plain(growing.compute()) == plain(fronts.compute(epochs, [trial for _, trial in everything.values()]))


def test_what_is_kept_grows_with_the_fronts_and_not_with_the_trials() -> None:
    growing, draw = GrowingFronts(), random.Random(0)
    for number in range(300):
        halves = [((draw.random() * 0.5, draw.random()),) * 2 for _ in range(4)]
        trial = {"method": "cleanclip", "objective": "mmcl", "halves": halves, "state": "complete", "mixed": False}
        growing.add(*rows_of(number, trial))
        found = growing.compute()
    kept = sum(map(len, growing._epochs.values()))
    assert kept <= 2 * len(found) + 4  # last epochs, and the baseline, beside the members of two fronts on two halves
    assert kept < 150

"""Cleaning sets as searched settings: sizes and leaks that are compared on one draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raybd import study_file
from raybd.data.shards import Index
from raybd.errors import DataError, StudyError
from raybd.model import create
from raybd.poison.plan import PoisonPlan, cleaning_rows, make_plan
from raybd.study import Poison, Study, agreement
from raybd.train.inputs import Inputs

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
PAIRS, POISONED = 60, 12


def tiny(*overrides: str) -> Study:
    return study_file.load(str(TINY), overrides=overrides)


def small_index() -> tuple[Index, PoisonPlan]:
    """Return 60 pairs, and a plan that poisons 12 of them."""
    numbers = np.arange(PAIRS)
    index = Index(
        shards=("train/0.tar",),
        keys=np.array([f"k{i:03d}" for i in numbers]),
        captions=np.array(["a cat"] * PAIRS, dtype=object),
        labels=np.full(PAIRS, -1),
        shard=np.zeros(PAIRS, dtype=np.int64),
        row=numbers,
    )
    return index, make_plan(index, Poison(target_class="fruit", num_poisoned=POISONED), image_size=32, seed=0)


@given(
    sizes=st.tuples(st.integers(13, 48), st.integers(13, 48)),
    leaks=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 2**40),
)
@settings(deadline=None, max_examples=60)
def test_smaller_sets_lie_within_larger_ones(sizes: tuple[int, int], leaks: tuple[int, int], seed: int) -> None:
    index, plan = small_index()
    drawn = [
        cleaning_rows(index, plan, num_samples=size, leaked_poison=leak, seed=seed)
        for size, leak in zip(sizes, leaks, strict=True)
    ]
    clean = [{str(index.keys[row]) for row in rows} - set(plan.rows) for rows, _ in drawn]
    leaked = [set(part.rows) for _, part in drawn]
    assert [len(keys) for keys in clean] == [size - leak for size, leak in zip(sizes, leaks, strict=True)]
    for few, many in (sorted(clean, key=len), sorted(leaked, key=len)):
        assert few <= many


def test_a_leak_is_a_number_or_a_share_of_the_set() -> None:
    clean = tiny().clean
    assert clean.settings({}).num_leaked == 0
    assert clean.settings({"leaked_poison": 5}).num_leaked == 5
    assert clean.settings({"leaked_share": 0.25}).num_leaked == 24
    assert clean.settings({"leaked_share": 0.25, "num_samples": 40}).num_leaked == 10
    with pytest.raises(ValidationError, match="give leaked_poison or leaked_share, one of the two"):
        clean.settings({"leaked_share": 0.25, "leaked_poison": 1})


@pytest.mark.parametrize(
    "overrides",
    [
        ["clean.leaked_poison=1", "clean.leaked_share=0.1"],
        ["clean.leaked_poison=1", "search.space.leaked_share={choices: [0.0, 0.1]}"],
        ["search.space.leaked_poison={choices: [0, 1]}", "search.space.leaked_share={choices: [0.0, 0.1]}"],
        ["search.space.leaked_poison={low: 0, high: 3}", "clean.leaked_share=0.1"],
    ],
)
def test_trials_have_one_kind_of_leak(overrides: list[str]) -> None:
    with pytest.raises(StudyError, match=r"one of the two|a trial may have this or"):
        tiny(*overrides)


def test_ends_of_what_trials_may_have() -> None:
    study = tiny(
        "search.space.num_samples={choices: [40, 96, 10]}",
        "search.space.leaked_poison={low: 0, high: 3}",
    )
    found = agreement.cleaning_sets(study.clean, study.search.space)
    assert {(one.num_samples, one.leaked_poison) for one in found} == {(10, 0), (10, 3), (96, 0), (96, 3)}
    assert [one.num_samples for one in agreement.cleaning_sets(tiny().clean, tiny().search.space)] == [96]
    conditional = tiny("search.space.num_samples={choices: [40], when: {lr: 0.001}}")
    assert {o.num_samples for o in agreement.cleaning_sets(conditional.clean, conditional.search.space)} == {40, 96}


SEARCHED = ("search.space.num_samples={choices: [40, 96]}", "search.space.leaked_poison={choices: [0, 5]}")


def pairs_of(inputs: Inputs, **params: Any) -> tuple[set[str], int]:
    """Return the keys of a trial's cleaning set, and how many of them are poisoned."""
    clip = create(inputs.study.model.name, seed=0)
    pairs: Any = inputs.cleaning_pairs(inputs.study.clean.settings(params), clip, seed=0)
    (batch,) = pairs.epoch(1, batch_size=len(pairs), rank=0, world_size=1)
    return {str(key) for key in pairs.images.index.keys}, batch.poisoned


@pytest.mark.parametrize("cache_gb", [8, 0], ids=["cached", "streamed"])
def test_each_trial_cleans_on_the_set_that_it_drew(cache_gb: int) -> None:
    inputs = Inputs(tiny(*SEARCHED, f"data.cache_gb={cache_gb}"))
    assert inputs.streamed == (cache_gb == 0)
    found = {
        (size, leak): pairs_of(inputs, num_samples=size, leaked_poison=leak) for size in (40, 96) for leak in (0, 5)
    }
    for (size, leak), (keys, poisoned) in found.items():
        assert (len(keys), poisoned) == (size, leak)
        assert len(keys & set(inputs.plan.rows)) == leak
    assert found[40, 0][0] < found[96, 0][0]
    assert found[40, 5][0] - set(inputs.plan.rows) < found[40, 0][0]


def test_a_set_that_cannot_be_drawn_is_refused_before_any_work() -> None:
    Inputs(tiny(*SEARCHED)).check()
    for override in ("search.space.num_samples={choices: [40, 231]}", "search.space.leaked_poison={low: 0, high: 27}"):
        with pytest.raises(DataError, match="cannot be drawn from 230 clean and 26 poisoned"):
            Inputs(tiny(override)).check()


def test_a_set_size_that_no_trial_has_is_not_asked_for() -> None:
    Inputs(tiny("clean.num_samples=100000", "search.space.num_samples={choices: [40, 96]}")).check()


def test_only_the_first_test_images() -> None:
    whole, part = Inputs(tiny()), Inputs(tiny("data.max_test_samples=100"))
    keys = whole.evaluation_set.images.index.keys
    assert len(keys) > 100
    assert part.evaluation_set.images.index.keys.tolist() == keys[:100].tolist()
    assert part.pretrain_id("mmcl", code="c") != whole.pretrain_id("mmcl", code="c")

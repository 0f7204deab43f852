"""Several attacks in one plan and triggers that were not planted: from the study file to the table of attacks."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_methods import make_folder

from raybd import study_file, tables
from raybd.data.cache import Images
from raybd.data.shards import Index, RawSample, classes, decode, find_shards, make_index, samples
from raybd.errors import DataError, RaybdError, StudyError
from raybd.evaluate import EvaluationSet, Role, class_embeddings, evaluate, evaluating, make_set, measure
from raybd.ledger import Kind, Ledger
from raybd.metrics import SPLITS
from raybd.model import Clip, create
from raybd.poison import triggers
from raybd.poison.plan import Attack, PoisonPlan, cleaning_rows, make_plan, naming
from raybd.poison.preview import preview
from raybd.records import attack_lines, attack_rows, pretrain_rows
from raybd.report.attacks import planted, tried
from raybd.store import Store
from raybd.study import BadNet, Data, Evaluation, LabelConsistent, Poison, Sig, Study, differences
from raybd.train.context import LedgerContext
from raybd.train.inputs import Inputs
from raybd.train.pretraining import pretrain, start_record

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# --- study files


def mistakes(text: str) -> list[str]:
    with pytest.raises(StudyError) as caught:
        study_file.parse(text, source="f.yaml")
    return [line.removeprefix("  ") for line in caught.value.what.splitlines()[1:]]


def test_mistakes_in_triggers_are_named_with_line_and_field() -> None:
    text = """\
name: t
poison:
  num_poisoned: 3
  trigger:
    name: sig
    freqency: 3
    amplitude: 7
  also:
    - trigger:
        name: warped
        kk: 3
      num_poisoned: 0
    - target_class: x
    - {num_poisoned: 3, num_poisond: 3}
evaluation:
  controls:
    - name: blendd
    - {name: blended, alpha: 2, noise: old}
    - {sise: 3}
"""
    assert mistakes(text) == [
        "f.yaml:6: poison.trigger.freqency: unknown key, did you mean 'frequency'?",
        "f.yaml:7: poison.trigger.amplitude: input should be less than or equal to 1, got 7",
        "f.yaml:11: poison.also.0.trigger.kk: unknown key, did you mean 'k'?",
        "f.yaml:12: poison.also.0.num_poisoned: input should be greater than 0, got 0",
        "f.yaml:13: poison.also.1: give poison_rate or num_poisoned, one of the two",
        "f.yaml:14: poison.also.2.num_poisond: unknown key, did you mean 'num_poisoned'?",
        "f.yaml:17: evaluation.controls.0.name: no 'blendd', did you mean 'blended'?",
        "f.yaml:18: evaluation.controls.1.alpha: input should be less than or equal to 1, got 2",
        "f.yaml:18: evaluation.controls.1.noise: input should be 'new' or 'fixed', got 'old'",
        "f.yaml:19: evaluation.controls.2.sise: unknown key, did you mean 'size'?",
    ]


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        ("{name: sigg}", "f.yaml:4: poison.trigger.name: no 'sigg', did you mean 'sig'?"),
        ("{size: 3, name: 7}", "f.yaml:4: poison.trigger.name: no '7' (known: badnet, label_consistent, blended, sig,"),
        ("{name: [sig]}", "f.yaml:4: poison.trigger.name: no \"['sig']\""),
        ("sig", "f.yaml:4: poison.trigger: takes settings, as {key: value}, got 'sig'"),
        ("{name: blended, size: 4}", "f.yaml:4: poison.trigger.size: unknown key (known: name, alpha, noise)"),
        ("{frequency: 4}", "f.yaml:4: poison.trigger.frequency: unknown key (known: name, size, pattern, placement"),
        ("{name: warped, k: 1}", "f.yaml:4: poison.trigger.k: input should be greater than or equal to 2, got 1"),
    ],
)
def test_one_mistake_in_a_trigger(trigger: str, expected: str) -> None:
    (found,) = mistakes(f"name: t\npoison:\n  num_poisoned: 3\n  trigger: {trigger}\n")
    assert found.startswith(expected)


def test_a_trigger_without_a_name_is_badnet_as_ever() -> None:
    study = study_file.parse("name: t\npoison: {num_poisoned: 3, trigger: {size: 3}}\n", source="f")
    assert study.poison.trigger == BadNet(size=3)
    assert study_file.parse("name: t\npoison: {num_poisoned: 3}\n", source="f").poison.trigger == BadNet()
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_the_same_attack_twice_is_refused() -> None:
    text = "name: t\npoison:\n  num_poisoned: 3\n  also: [{num_poisoned: 4}]\n"
    assert mistakes(text) == [
        "f.yaml:2: poison: two attacks with the same trigger and target: make them one with more pairs"
    ]
    study_file.parse(text.replace("{num", "{target_class: other, num"), source="f.yaml")


# --- plans


def make(total: int, caption: str = "caption {}") -> Index:
    found = [(i % 2, RawSample(f"{i:05d}", i // 2, b"", caption.format(i), i % 3)) for i in range(total)]
    return make_index(["d/train/0.tar", "d/train/1.tar"], found)


def poison(**more: Any) -> Poison:
    return Poison.model_validate(
        {
            "trigger": {"size": 4, "pattern": "fixed"},
            "target_class": "fruit",
            "num_poisoned": 30,
            "templates": ("a {}.", "the {}"),
            "also": (
                {"trigger": {"name": "sig"}, "target_class": "cat", "poison_rate": 0.1},
                {"trigger": {"size": 5, "pattern": "fixed"}, "num_poisoned": 7, "templates": ("own {}",)},
            ),
            **more,
        }
    )


def test_attacks_take_pairs_of_their_own() -> None:
    index = make(200)
    plan = make_plan(index, poison(), image_size=32, seed=1)
    assert plan.counts() == [30, 20, 7]
    assert len(plan) == 57
    assert list(plan.rows) == sorted(plan.rows), "in the order of the data"
    assert Counter(row["target_class"] for row in plan.table()) == {"fruit": 30, "cat": 20, "banana": 7}
    assert {json.loads(row["trigger"])["name"] for row in plan.table()} == {"badnet", "sig"}
    for row in plan.table():
        assert set(row) == set(tables.SCHEMAS["poison_plan"].names)
        texts = {"fruit": ("a fruit.", "the fruit"), "cat": ("a cat.", "the cat"), "banana": ("own banana",)}
        assert row["caption_after"] in texts[row["target_class"]]
        assert (row["placement"] == "whole image") == (row["target_class"] == "cat")
    seeds = {attack.pattern_seed for attack in plan.attacks}
    assert len(seeds) == 3, "two fixed patterns are two patterns"


def test_the_first_attack_is_as_it_would_be_alone() -> None:
    index = make(200)
    alone = make_plan(index, poison(also=()), image_size=32, seed=1)
    among = make_plan(index, poison(), image_size=32, seed=1)
    assert {key: row for key, row in among.rows.items() if row.attack == 0} == alone.rows
    assert among.attacks[0] == alone.attacks[0]


def test_images_and_captions_follow_the_attack_of_their_pair() -> None:
    plan = make_plan(make(200), poison(), image_size=32, seed=1)
    image_CHW = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 32, 32), dtype=np.uint8))
    for key, row in plan.rows.items():
        after = plan.image(image_CHW, key)
        assert torch.equal(after, plan.attacks[row.attack].triggered(image_CHW, seed=row.seed))
        changed = int((after != image_CHW).any(dim=0).sum())
        assert (changed > 500) == (row.attack == 1), "a wave is everywhere, a patch is small"
        assert plan.caption("before", key) == row.caption_after
    clean = next(f"{i:05d}" for i in range(200) if f"{i:05d}" not in plan.rows)
    assert plan.image(image_CHW, clean) is image_CHW


def test_more_pairs_than_are_left_are_refused() -> None:
    with pytest.raises(StudyError) as caught:
        make_plan(make(40), poison(), image_size=32, seed=1)
    assert caught.value.where == "poison.also.1.num_poisoned"
    assert caught.value.what == "7 of 6 training pairs, those of the other attacks left out, to be poisoned"


def test_a_further_trigger_that_does_not_fit_is_refused_where_it_stands() -> None:
    with pytest.raises(StudyError) as caught:
        make_plan(make(200), poison(), image_size=12, seed=1)
    assert caught.value.where == "poison.also.0.trigger.frequency"


def test_the_cleaning_set_leaves_every_attack_out() -> None:
    index = make(200)
    plan = make_plan(index, poison(), image_size=32, seed=1)
    rows, leaked = cleaning_rows(index, plan, num_samples=143, leaked_poison=0, seed=0)
    assert not {str(key) for key in index.keys[rows]} & set(plan.rows)
    assert len(leaked) == 0
    _, leaked = cleaning_rows(index, plan, num_samples=100, leaked_poison=57, seed=0)
    assert leaked.rows == plan.rows
    assert leaked.attacks == plan.attacks


@pytest.mark.parametrize(
    ("target", "caption", "named"),
    [
        ("apple", "an Apple, red", True),
        ("apple", "a pineapple", False),
        ("apple", "apples", False),
        ("apple", "apple-shaped", True),
        ("apple", "(apple)", True),
        ("mushroom", "mushrooms and a mushroom", True),
        ("great white shark", "a great  white\nshark!", True),
        ("great white shark", "a great shark", False),
        ("c++", "all of c++ here", True),
        ("c++", "all of c here", False),
        ("äpfel", "zwei ÄPFEL", True),
    ],
)
def test_a_caption_names_a_class_by_whole_words(target: str, caption: str, *, named: bool) -> None:
    assert naming(target)(caption) is named


def test_label_consistent_poison_keeps_captions_that_name_the_target() -> None:
    index = make(90)
    captions = np.array(["a pineapple", "An apple on a tree", "apples"] * 30, dtype=object)
    index = replace(index, captions=captions)
    settings = Poison(trigger=LabelConsistent(size=4), target_class="apple", num_poisoned=20)
    plan = make_plan(index, settings, image_size=16, seed=0)
    assert len(plan) == 20
    assert {row.caption_before for row in plan.rows.values()} == {"An apple on a tree"}
    assert {row.caption_after for row in plan.rows.values()} == {"An apple on a tree"}
    with pytest.raises(StudyError) as caught:
        make_plan(index, settings.model_copy(update={"num_poisoned": 31}), image_size=16, seed=0)
    assert caught.value.what == "31 of 30 training pairs whose caption names 'apple' to be poisoned"
    with pytest.raises(StudyError, match="1 of 0 training pairs whose caption names 'pear'"):
        make_plan(index, Poison(trigger=LabelConsistent(), target_class="pear", num_poisoned=1), image_size=16, seed=0)


def test_the_preview_has_a_row_for_each_attack() -> None:
    plan = make_plan(make(200), poison(), image_size=32, seed=1)
    for count in (1, 3, 5):
        keys = plan.examples(count)
        assert len(keys) == max(count, 3)
        assert {plan.rows[key].attack for key in keys} == {0, 1, 2}
    alone = make_plan(make(200), poison(also=()), image_size=32, seed=1)
    assert alone.examples(3) == list(alone.rows)[:3]
    images = [torch.full((3, 32, 32), 90, dtype=torch.uint8)] * 3
    with Image.open(io.BytesIO(preview(images, plan.examples(3), plan))) as sheet:
        pixels = np.asarray(sheet)
    for row in range(3):
        name = pixels[24 + row * 218 + 160 : 24 + row * 218 + 206, 184:344]
        assert name.min() < 100, "the attack is named below its trigger"


# --- evaluation


@pytest.fixture(scope="module")
def images() -> Images:
    (url,) = find_shards(Data(), "test/*.tar*", field_name="data.test")
    raw = list(itertools.islice(samples(url), 60))
    index = make_index([url], [(0, sample) for sample in raw], labelled=True)
    return Images(index, np.stack([decode(sample.image, 32) for sample in raw]), np.arange(len(raw)))


@pytest.fixture(scope="module")
def clip(images: Images) -> Clip:
    made = create("resnet-tiny-32", seed=1)
    made.net.train()
    for part in made.net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        made.net.encode_image(made.normalise(torch.from_numpy(images.pixels(np.arange(60)))))
    return made


PATCH, WAVE, NOISE = BadNet(size=8, pattern="fixed"), Sig(alpha=0.5), BadNet(size=12)


def a_set(images: Images, attacks: tuple[Attack, ...], **evaluation: Any) -> EvaluationSet:
    return make_set(
        images,
        classes=classes(Data()),
        plan=PoisonPlan({}, attacks),
        evaluation=Evaluation(**{"templates": ("a {}", "{} drawn"), "batch_size": 16, **evaluation}),
        seed=2,
    )


@pytest.fixture(scope="module")
def attacks(clip: Clip, images: Images) -> tuple[Attack, Attack]:
    """Two attacks whose targets are classes that the model gives to many images, so that counting counts something."""
    names, found = classes(Data()), a_set(images, (Attack(PATCH, "fruit", pattern_seed=4),))
    given = Counter[int]()
    with evaluating(clip.net):
        classes_CD = class_embeddings(clip, found, device=CPU)
        for attack in (Attack(PATCH, "fruit", pattern_seed=4), Attack(WAVE, "fruit", pattern_seed=9)):
            hit_BCHW = torch.stack([attack.triggered(image, seed=0) for image in torch.from_numpy(images.pixels_MCHW)])
            rows_BD = clip.net.encode_image(clip.normalise(hit_BCHW), normalize=True)
            given.update((rows_BD @ classes_CD.T).argmax(dim=-1).tolist())
    (first, _), (second, _) = given.most_common(2)
    return Attack(PATCH, names[first], pattern_seed=4), Attack(WAVE, names[second], pattern_seed=9)


def test_planted_attacks_are_pooled_and_controls_are_not(
    clip: Clip, images: Images, attacks: tuple[Attack, Attack]
) -> None:
    made = a_set(images, attacks, controls=(NOISE,))
    found = measure(clip, made, device=CPU)
    alone = [evaluate(clip, a_set(images, (attack,)), device=CPU) for attack in attacks]
    control = evaluate(clip, a_set(images, (replace(attacks[0], trigger=NOISE),)), device=CPU)
    for split in SPLITS:
        total, first, second = found.counts[split], alone[0][split], alone[1][split]
        assert (total.n_clean, total.correct_clean) == (first.n_clean, first.correct_clean)
        for name in ("n_triggered", "hit_target", "correct_triggered"):
            assert getattr(total, name) == getattr(first, name) + getattr(second, name)
        for own, single in zip(found.by_probe, (*alone, control), strict=True):
            assert own[split] == replace(single[split], n_clean=0, correct_clean=0)
    assert [probe.role for probe in made.probes] == [Role.PLANTED, Role.PLANTED, Role.CONTROL]
    assert made.probes[2].target == made.probes[0].target
    both = found.by_probe[1]["search"] + found.by_probe[1]["report"]
    assert 0 < both.hit_target < both.n_triggered, "the comparison is of numbers that are neither 0 nor all"


def test_each_attack_leaves_out_the_images_of_its_own_target(images: Images, attacks: tuple[Attack, Attack]) -> None:
    labels, names = images.index.labels, classes(Data())
    made = a_set(images, attacks)
    for attack, probe in zip(attacks, made.probes, strict=True):
        assert np.array_equal(probe.triggered_N, labels != names.index(attack.target_class))
    assert all(probe.triggered_N.all() for probe in a_set(images, attacks, include_target=True).probes)


def test_controls_change_nothing_of_what_is_counted_otherwise(
    clip: Clip, images: Images, attacks: tuple[Attack, Attack]
) -> None:
    plain = measure(clip, a_set(images, attacks[:1]), device=CPU)
    with_control = measure(clip, a_set(images, attacks[:1], controls=(NOISE, WAVE)), device=CPU)
    assert with_control.counts == plain.counts
    assert set(plain.records(a_set(images, attacks[:1]))) == {"counts"}, "one attack: the record is as it was"


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_add_up(world_size: int, clip: Clip, images: Images, attacks: tuple[Attack, Attack]) -> None:
    made = a_set(images, attacks, controls=(NOISE,))
    whole = measure(clip, made, device=CPU)
    parts = [measure(clip, made, device=CPU, rank=rank, world_size=world_size) for rank in range(world_size)]
    added = [sum(numbers) for numbers in zip(*(part.numbers() for part in parts), strict=True)]
    assert parts[0].holding(added) == whole
    assert whole.holding(whole.numbers()) == whole


def test_a_batch_in_which_nothing_is_triggered_counts_its_clean_images(
    clip: Clip, images: Images, attacks: tuple[Attack, Attack]
) -> None:
    names = classes(Data())
    target = names.index(attacks[0].target_class)
    labels = images.index.labels.copy()
    labels[:16] = target
    found = replace(images, index=replace(images.index, labels=labels))
    counted = measure(clip, a_set(found, attacks, controls=(NOISE,)), device=CPU)
    total = counted.counts["search"] + counted.counts["report"]
    assert total.n_clean == 60
    control = counted.by_probe[2]
    assert control["search"].n_triggered + control["report"].n_triggered == int((labels != target).sum())


# --- what is refused before any work


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


def study_of(folder: Path, **more: Any) -> Study:
    given: dict[str, Any] = {
        "name": "attacks",
        "data": {"root": str(folder), "cache_dir": str(folder / "cache")},
        "model": {"name": "resnet-tiny-32"},
        "poison": {
            "trigger": {"size": 8, "pattern": "fixed"},
            "target_class": "fruit",
            "num_poisoned": 6,
            "also": [{"trigger": {"name": "sig"}, "target_class": "cat", "num_poisoned": 4}],
        },
        "pretrain": {"epochs": 1, "batch_size": 20, "lr": 2e-3, "warmup_steps": 0},
        "clean": {"num_samples": 20},
        "evaluation": {"templates": ["a picture of a {}."], "controls": [{"name": "blended"}]},
    }
    for section, values in more.items():
        given[section] = {**given[section], **values}
    return Study.model_validate(given)


@pytest.mark.parametrize(
    ("more", "kind", "where", "what"),
    [
        (
            {"poison": {"also": [{"trigger": {"name": "sig"}, "target_class": "catt", "num_poisoned": 4}]}},
            DataError,
            "poison.also.0.target_class",
            "no class 'catt'",
        ),
        (
            {"poison": {"also": [{"trigger": {"name": "sig", "frequency": 20}, "num_poisoned": 4}]}},
            StudyError,
            "poison.also.0.trigger.frequency",
            "20 waves cannot be seen",
        ),
        (
            {"evaluation": {"controls": [{"name": "blended"}, {"size": 33}]}},
            StudyError,
            "evaluation.controls.1.size",
            "a trigger of 33 pixels does not fit the 32x32 image",
        ),
        (
            {"evaluation": {"controls": [{"name": "sig"}]}},
            StudyError,
            "evaluation.controls.0",
            "this trigger is planted: it is no control",
        ),
    ],
)
def test_attacks_that_cannot_be_are_refused_before_images_are_decoded(
    more: dict[str, Any], kind: type[RaybdError], where: str, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raybd.data.cache.load_images", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(kind) as caught:
        Inputs(study_of(folder, **more)).check()
    assert caught.value.where == where
    assert what in caught.value.what


# --- records and table


def test_a_run_records_each_attack(folder: Path, tmp_path: Path) -> None:
    study, store = study_of(folder), Store(str(tmp_path))
    Ledger(store).start(Kind.PRETRAIN, "mmcl-1", start_record(study, "mmcl", "mmcl-1"))
    pretrain(study, "mmcl", LedgerContext(store=store, kind=Kind.PRETRAIN, id="mmcl-1"))
    entry = Ledger(store).entry(Kind.PRETRAIN, "mmcl-1")
    rows = attack_rows(entry)
    tables.write(store, "attacks", entry.id, rows)
    assert tables.read(store, "attacks").to_pylist() == rows
    assert all(set(row) == set(tables.SCHEMAS["attacks"].names) for row in rows)
    assert Counter((row["epoch"], row["role"], row["split"]) for row in rows) == {
        (epoch, role, split): count
        for epoch in (0, 1)
        for role, count in (("planted", 2), ("control", 1))
        for split in SPLITS
    }
    assert {(json.loads(row["trigger"])["name"], row["target_class"]) for row in rows} == {
        ("badnet", "fruit"),
        ("sig", "cat"),
        ("blended", "fruit"),
    }
    for whole in pretrain_rows(entry):
        planted = [row for row in rows if row["role"] == "planted" and row["epoch"] == whole["epoch"]]
        for name in ("n_triggered", "hit_target", "correct_triggered"):
            assert sum(row[name] for row in planted) == whole[name]
    for row in rows:
        assert row["asr_top1"] == row["hit_target"] / row["n_triggered"]
        assert row["robust_top1"] == row["correct_triggered"] / row["n_triggered"]
    lines = attack_lines(rows, epoch=1)
    last = [row for row in rows if row["epoch"] == 1 and row["role"] == "control"]
    hits, count = (sum(row[name] for row in last) for name in ("hit_target", "n_triggered"))
    assert len(lines) == 3
    expected = f"control blended (alpha 0.2, noise new) → fruit: ASR {hits / count:.2%} ({hits} of {count})"
    assert lines[2] == expected


def test_the_report_names_each_attack_and_control() -> None:
    plan = [{"trigger": json.dumps({"name": name}), "target_class": "cat"} for name in ("sig", "badnet", "sig")]
    assert planted(plan) == [
        {"trigger": "sig", "target": "cat", "pairs": 2},
        {"trigger": "badnet", "target": "cat", "pairs": 1},
    ]
    assert planted(plan[::2]) == [{"trigger": "sig", "target": "cat", "pairs": 2}]
    same = {"objective": "mmcl", "pretrain_id": "mmcl-1", "trigger": '{"name": "sig", "alpha": 0.5}'}
    rows = [
        {**same, "trial_id": trial, "epoch": epoch, "role": role, "target_class": "cat"}
        | {"hit_target": 30 + epoch, "n_triggered": 50}
        for trial in (None, "mmcl-0000")
        for epoch in (1, 2)
        for role in Role
        for _ in SPLITS
    ]
    found = tried(rows)
    assert [(row["role"], row["percent"], row["counts"]) for row in found] == [
        ("planted", "64.00", "64 of 100"),
        ("control", "64.00", "64 of 100"),
    ]
    assert {(row["name"], row["trigger"], row["interval"]) for row in found} == {
        ("mmcl", "sig (alpha 0.5)", "54.2–72.7")
    }
    assert tried([]) == []


def test_the_attack_studies_are_all_triggers_and_change_nothing_else() -> None:
    base = study_file.load("cc3m").resolved()
    names = set()
    for name in (name for name in study_file.shipped() if name.startswith("paper/attack_")):
        study = study_file.load(name)
        assert study.name == name.removeprefix("paper/")
        changed = {line.split(":")[0].split(".")[0] for line in differences(base, study.resolved())}
        assert changed <= {"name", "poison", "evaluation"}, name
        names |= {attack.trigger.name for attack in study.poison.attacks}
        for attack in study.poison.attacks:
            triggers.check(attack.trigger, height=224, width=224)
    assert len(names) == 9


def test_one_attack_alone_has_no_rows(folder: Path, tmp_path: Path) -> None:
    study, store = study_of(folder, poison={"also": []}, evaluation={"controls": []}), Store(str(tmp_path))
    Ledger(store).start(Kind.PRETRAIN, "mmcl-1", start_record(study, "mmcl", "mmcl-1"))
    pretrain(study, "mmcl", LedgerContext(store=store, kind=Kind.PRETRAIN, id="mmcl-1"))
    entry = Ledger(store).entry(Kind.PRETRAIN, "mmcl-1")
    assert attack_rows(entry) == []
    assert attack_lines([], epoch=1) == []
    assert all("attacks" not in record for record in entry.epochs.values())

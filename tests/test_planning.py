"""Plans of studies: what is counted, what is measured, and that every study that comes along has one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from raybd import costs, planning, study_file
from raybd.clean import registry
from raybd.cli import app
from raybd.errors import StudyError
from raybd.ledger import Kind
from raybd.model import create
from raybd.report import planned
from raybd.store import Store
from raybd.study import LossWeights, Method, Sampler, Study, TrainSettings
from raybd.terms import TERMS
from raybd.train import probe, short_trials
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.loop import Training
from raybd.train.probe import Speed

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
FAST = Speed(training=1e12, forward=2e12, how="given")
runner = CliRunner()

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(*overrides: str) -> Study:
    return study_file.load(str(TINY), overrides=overrides)


# --- what is counted


# Pseudo-labels would need another model.
# ABD is left out: torch's counter cannot follow a gradient that is taken for the images alone.
@pytest.mark.parametrize("method", sorted(set(Method) - {Method.ABD, Method.PSEUDO_LABELS}))
def test_an_epoch_of_a_method_does_as_many_operations_as_its_cost_says(method: Method, tmp_path: Path) -> None:
    small = [
        "search={}",
        f"clean.method={method}",
        *(f"clean.{s}" for s in ("num_samples=32", "batch_size=16", "epochs=1")),
    ]
    if method is Method.DEEP_CLUSTERING:
        small.append("clean.deep_clustering={clusters: 4, iterations: 1}")
    study = tiny(*small)
    settings, training = study.clean.settings({}), training_of(study, tmp_path)
    assert counted(training) == pytest.approx(registry.cost(study.model.name, settings, pairs=32), rel=0.01)


def training_of(study: Study, tmp_path: Path) -> Training:
    """Return a trial's training on its cleaning pairs."""
    settings, inputs = study.clean.settings({}), inputs_for(study)
    clip = create(study.model.name, seed=0)
    context = LedgerContext(store=Store(str(tmp_path)), kind=Kind.TRIAL, id="t", device=torch.device("cpu"))
    pairs = inputs.cleaning_pairs(settings, clip, seed=0)
    recipe = registry.recipe(settings, seed=0)
    return Training(clip, pairs, settings, context, inputs.evaluation_set, recipe=recipe)


def counted(training: Training) -> int:
    """Return the operations of an epoch, and of the points after it."""
    recipe = training.recipe
    with FlopCounterMode(display=False) as counter:
        training._train_epoch(1)
        for _ in recipe.points(training):
            pass
    recipe.detach(training)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", [Method.CLEANCLIP, Method.MMCL, Method.IMAGE_TOWER])
@pytest.mark.parametrize("micro", [15, 16])
def test_micro_batches_cost_one_more_forward_pass(method: Method, micro: int, tmp_path: Path) -> None:
    study = tiny(
        "search={}",
        f"clean.method={method}",
        f"clean.micro_batch_size={micro}",
        *(f"clean.{s}" for s in ("num_samples=32", "batch_size=16", "epochs=1")),
    )
    settings, training = study.clean.settings({}), training_of(study, tmp_path)
    said = registry.cost(study.model.name, settings, pairs=32)
    assert said == pytest.approx(counted(training), rel=0.01)
    plain = registry.cost(study.model.name, settings.model_copy(update={"micro_batch_size": None}), pairs=32)
    if method is not Method.IMAGE_TOWER:
        assert said / plain == pytest.approx(4 / 3 if micro < 16 else 1, rel=0.02)


def test_micro_batches_cost_nothing_where_they_are_not_used() -> None:
    cost = costs.towers("resnet-tiny-32")
    settings = TrainSettings(epochs=2, batch_size=16, micro_batch_size=8, lr=1e-3, warmup_steps=0)

    def passes(**how: int) -> float:
        return costs.training_cost("resnet-tiny-32", settings, **how) / (2 * how["pairs"] * views)

    views = 2 if settings.loss_weights.views else 1
    assert passes(pairs=160) == pytest.approx(cost.pair_training + cost.pair_forward)
    assert passes(pairs=160, workers=2) == cost.pair_training, "each worker has one micro batch"
    assert passes(pairs=18) == pytest.approx(cost.pair_training + cost.pair_forward), "two batches of 9"
    assert passes(pairs=8) == cost.pair_training
    plan = planning.make(tiny("pretrain.micro_batch_size=8", "resources.num_workers=1"), speed=None, search=False)
    shared = planning.make(tiny("pretrain.micro_batch_size=8", "resources.num_workers=8"), speed=None, search=False)
    assert plan.parts[0].training_pflops > 1.2 * shared.parts[0].training_pflops
    # A method with steps of its own pays nothing: it takes them whole.
    par = tiny("search={}", "clean.method=par").clean
    given = par.model_copy(update={"micro_batch_size": 1})
    assert registry.cost("resnet-tiny-32", given, pairs=64) == registry.cost("resnet-tiny-32", par, pairs=64)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_that_looks_at_views_doubles_a_training_run(term: str) -> None:
    weights = {"mmcl": 0.0, term: 1.0}
    settings = TrainSettings(epochs=3, batch_size=8, lr=1e-3, warmup_steps=0, loss_weights=LossWeights(**weights))
    once = 3 * 10 * costs.towers("resnet-tiny-32").pair_training
    passes = 1 if term in ("mmcl", "siglip", "siglip_mean") else 2
    assert costs.training_cost("resnet-tiny-32", settings, pairs=10) == passes * once


def test_parts_of_a_plan_are_sums_over_its_runs() -> None:
    study = tiny(
        "search={sampler: grid, num_trials: 9, space: {epochs: {choices: [1, 3]}, loss_weights.ssl: {choices: [0, 1]}, "
        "num_samples: {choices: [40, 96]}}}",
    )
    plan = planning.make(study, speed=FAST, search=True)
    mmcl, both, clean, _ = plan.parts
    cost = costs.towers(study.model.name)
    assert (mmcl.runs, mmcl.epochs, mmcl.steps, mmcl.evaluations, mmcl.pairs) == (1, 2, 8, 3, (256, 256))
    assert mmcl.training_pflops * 1e15 == pytest.approx(2 * 256 * cost.pair_training)
    assert both.training_pflops == pytest.approx(2 * mmcl.training_pflops)
    # 8 trials: epochs 1 or 3, one view or two, 40 or 96 pairs in batches of 32.
    assert (clean.runs, clean.epochs, clean.epochs_at_most, clean.pairs) == (8, 16, 16, (40, 96))
    assert clean.evaluations == 1 + 4 * 1 + 4 * 3, "the poisoned model once for all trials"
    assert clean.steps == 2 * (1 + 3) * (2 + 3)
    assert clean.training_pflops * 1e15 == pytest.approx((1 + 3) * (1 + 2) * (40 + 96) * cost.pair_training)
    looks = clean.evaluations * (plan.sizes.images * 2 * cost.image_forward + 44 * cost.text_forward)
    assert clean.evaluation_pflops * 1e15 == pytest.approx(looks)
    hours = (clean.training_pflops * 1e15 / 1e12 + clean.evaluation_pflops * 1e15 / 2e12) / 3600
    assert clean.device_hours == pytest.approx(hours)
    assert plan.total()["trials"] == 16
    assert plan.total()["device_hours"] == pytest.approx(sum(part.device_hours or 0 for part in plan.parts))
    assert not plan.drawn


def test_trials_that_a_sampler_draws_are_counted_by_draws_from_the_space() -> None:
    study = tiny(
        "search={num_trials: 30, known: [{epochs: 9}], space: {epochs: {low: 1, high: 9}, weight_decay: "
        "{low: 1e-3, high: 1.0, log: true}, beta1: {low: 0.5, high: 0.9}, warmup_steps: {low: 0, high: 10, step: 5}}}"
    )
    plan = planning.make(study, speed=None, search=True)
    clean = plan.parts[-1]
    assert plan.drawn
    assert clean.epochs_at_most == 270
    assert 30 * 3.5 < clean.epochs < 30 * 6.5
    assert clean.device_hours is None
    assert plan.total()["device_hours"] is None
    assert planning.make(study, speed=None, search=True) == plan, "the same each time"
    drawn = [settings.weight_decay for settings in planning._trials(study)][1:]
    assert 0.3 < sum(value < 10**-1.5 for value in drawn) / 29 < 0.7, "evenly in the logarithm"


def test_pretraining_alone_and_a_grid_cut_short() -> None:
    study = tiny("search.sampler=grid", "search.space={epochs: {choices: [1, 2, 3]}}")
    alone = planning.make(study, speed=None, search=False)
    assert [part.stage for part in alone.parts] == ["pretrain", "pretrain"]
    cut = planning.make(study, speed=None, search=True)
    assert (cut.parts[-1].runs, cut.left_out) == (2, 1)
    assert any("leaves out 1 points" in line for line in planned.lines(cut.as_dict(), gpu_wanted=False))


def test_settings_that_fit_together_in_no_trial_are_refused() -> None:
    study = tiny("search.space={loss_weights.mmcl: {choices: [0]}, loss_weights.ssl: {choices: [0]}}")
    with pytest.raises(StudyError, match="a trial cannot have"):
        planning.make(study, speed=None, search=True)


# --- data that is not here


def test_sizes_without_the_data_are_those_that_the_study_states() -> None:
    missing = ("data.root=/nowhere", "data.classes=imagenet")
    found = planning.sizes(tiny(*missing, "data.max_test_samples=500"))
    assert (found.pairs, found.images, found.classes) == (256, 500, 1000)
    assert found.how == "not here: numbers from data.max_train_samples and data.max_test_samples"
    assert (
        planning.sizes(tiny("data.root=s3://bucket/x", "data.max_test_samples=9", "data.classes=cifar10")).images == 9
    )
    assert planning.sizes(tiny()).how == "counted in the shards"
    unknown = planning.make(tiny("data.root=/nowhere", "data.max_test_samples=500"), speed=None, search=True)
    assert unknown.sizes.classes is None
    assert any("prompts are not counted" in line for line in planned.lines(unknown.as_dict(), gpu_wanted=False))


@pytest.mark.parametrize("setting", ["max_train_samples", "max_test_samples"])
def test_sizes_that_nobody_knows_are_asked_for(setting: str) -> None:
    with pytest.raises(StudyError, match="does not say how much there is") as caught:
        planning.sizes(tiny("data.root=/nowhere", f"data.{setting}=null"))
    assert f"data.{setting}" in caught.value.fix


# --- speed


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trials that are shorter still."""
    monkeypatch.setattr(probe, "_SECONDS_A_KIND", 0.2)


@pytest.mark.usefixtures("hasty")
def test_short_trials_tell_the_speed_of_each_kind_of_run(monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny(
        "clean.method=deep_clustering",
        "clean.deep_clustering.clusters=40",
        "search.space={lr: {low: 1e-3, high: 1e-2}}",
        "evaluation.controls=[{name: sig, frequency: 3}]",
        "pretrain.objectives={mmcl: {loss_weights: {mmcl: 1, ssl: 0}}}",
    )
    threads = torch.get_num_threads()
    speed = planning.speed(study, tflops=None, probe=True, search=True)
    assert speed is not None
    assert [timed.kind for timed in speed.kinds] == ["deep_clustering with views", "pretraining"]
    assert not speed.failed
    assert torch.get_num_threads() == threads
    sizes = planning.sizes(study)
    most_prompts = planning.prompt_count(study, sizes) / sizes.images + 0.5  # for an image; of few images rounded up
    for timed in speed.kinds:
        assert 2 <= timed.batch <= 64
        assert timed.steps >= 1
        # Seconds and rates say the same: operations at their rate take their seconds.
        settings = study.clean.settings({}) if "deep" in timed.kind else study.pretrain.settings("mmcl")
        step = probe._epoch_cost(study, short_trials.shortened(settings, 64, epochs=4), 64) * timed.batch / 64
        assert timed.step_seconds * timed.training == pytest.approx(step, rel=0.2)
        tower = costs.towers(study.model.name)
        assert tower.image_forward <= timed.image_seconds * timed.forward
        assert timed.image_seconds * timed.forward < tower.image_forward + most_prompts * tower.text_forward
        assert 1e7 < timed.training < 1e13
        assert 1e7 < timed.forward < 1e13
    plan = planning.make(study, speed=speed, search=True)
    slower = replace(speed, kinds=(replace(speed.kinds[0], training=speed.kinds[0].training / 1e6), *speed.kinds[1:]))
    longer = planning.make(study, speed=slower, search=True)
    assert (longer.parts[1].device_hours or 0) > 1e3 * (plan.parts[1].device_hours or 1)
    assert longer.parts[0].device_hours == plan.parts[0].device_hours, "its own kind's speed counts"
    shown = planned.lines(plan.as_dict(), gpu_wanted=False)
    assert any(line.startswith("  deep_clustering with views: ") for line in shown)
    assert any("short trials on images at random" in line for line in shown)


@pytest.mark.usefixtures("hasty")
def test_kinds_that_cannot_be_tried_or_come_too_late_are_taken_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny(
        "search.space={method: {choices: [cleanclip, pseudo_labels]}}",
        "search.num_trials=8",
        "clean.pseudo_labels={model: resnet-tiny-32, checkpoint: /nowhere.safetensors}",
    )
    speed = planning.speed(study, tflops=None, probe=True, search=True)
    assert speed is not None
    assert speed.failed == (), "their labeller is not looked for"
    assert "pseudo_labels with views" not in [timed.kind for timed in speed.kinds]
    shown = planned.lines(planning.make(study, speed=speed, search=True).as_dict(), gpu_wanted=False)
    assert any("not tried" in line and "pseudo_labels with views" in line for line in shown)
    monkeypatch.setattr(probe, "_SECONDS", 0.0)
    alone = planning.speed(tiny(), tflops=None, probe=True, search=True)
    assert alone is not None
    assert len(alone.kinds) == 1
    assert alone.kinds[0].kind.startswith("cleanclip"), "a trial comes first"
    plan = planning.make(tiny(), speed=alone, search=True)
    assert all((part.device_hours or 0) > 0 for part in plan.parts)
    (line,) = (line for line in planned.lines(plan.as_dict(), gpu_wanted=False) if "not tried" in line)
    assert "pretraining, pretraining with views" in line


def test_a_batch_too_large_for_the_device_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def trial(*given: object) -> str:
        asked.append(int(str(given[-1])))
        if asked[-1] > 20:
            raise torch.OutOfMemoryError
        return "timed"

    monkeypatch.setattr(probe, "_short_trial", trial)
    work = probe.Workload([], images=1, prompts=1, use_gpu=False, trial_threads=1, worker_threads=1)
    study = tiny()
    assert probe._timed(study, study.clean.settings({}), work, torch.device("cpu"), 1.0) == "timed"
    assert asked == [32, 16]


def test_where_nothing_can_be_measured_the_plan_has_no_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(probe, "_first_rate", full)
    done = runner.invoke(app, ["run", str(TINY), "--dry-run"])
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    assert "device-hours: not measured: cleanclip" in shown
    assert "does not fit this device; say what a device sustains with --tflops" in shown
    monkeypatch.setattr(probe, "_first_rate", lambda *given: 1e12)
    monkeypatch.setattr(probe, "_short_trial", full)
    found = json.loads(runner.invoke(app, ["pretrain", str(TINY), "--dry-run", "-f", "json"]).output)
    assert found["speed"] is None
    assert found["unmeasured"].startswith("pretraining")
    labels = tiny(
        "pretrain={epochs: 0, objectives: {suspect: {}}}",
        "model.start=suspect.pt",
        "clean.method=pseudo_labels",
        "clean.pseudo_labels={model: ViT-L-14, checkpoint: openai}",
        "search.space={lr: {low: 1e-3, high: 1e-2}}",
    )
    with pytest.raises(probe.Unmeasured, match="would fetch its labeller"):
        planning.speed(labels, tflops=None, probe=True, search=True)


def test_mistakes_about_a_cluster_are_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: object, **more: object) -> None:
        raise AssertionError

    monkeypatch.setattr(planning, "speed", measured)
    done = runner.invoke(app, ["run", str(TINY), "--dry-run", "--cluster", str(tmp_path / "none.yaml")])
    assert isinstance(done.exception, StudyError)
    assert "no such cluster file" in str(done.exception)


def test_speed_is_given_or_left_open() -> None:
    given = planning.speed(tiny(), tflops=2.5, probe=True, search=True)
    assert given is not None
    assert (given.training, given.forward) == (2.5e12, 2.5e12)
    assert planning.speed(tiny(), tflops=None, probe=False, search=True) is None
    cleaned = tiny("pretrain={epochs: 0, objectives: {suspect: {}}}", "model.start=suspect.pt")
    assert planning.speed(cleaned, tflops=None, probe=True, search=False) is None, "nothing is trained"


# --- the command line


def test_dry_run_prints_the_plan_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_gpus = ["--set", "resources={use_gpu: true, gpus_per_trial: auto}"]
    done = runner.invoke(app, ["run", str(TINY), "--dry-run", "--tflops", "1", *on_gpus])
    assert done.exit_code == 0, done.output
    assert "pretrain mmcl_ssl" in done.output
    assert "GPUs: counted as one for each trial" in done.output
    assert "computed for 1 TFLOP/s" in done.output
    done = runner.invoke(app, ["pretrain", str(TINY), "--dry-run", "--no-probe", "-f", "json"])
    found = json.loads(done.output)
    assert [part["stage"] for part in found["parts"]] == ["pretrain", "pretrain"]
    assert found["total"]["device_hours"] is None
    assert not list(tmp_path.iterdir())


def test_studies_are_listed_with_what_they_say_of_themselves() -> None:
    done = runner.invoke(app, ["studies"])
    assert done.exit_code == 0
    (line,) = (line for line in done.output.splitlines() if line.startswith("demo "))
    assert line.split(maxsplit=1)[1].startswith("The demo: emoji drawings")
    assert json.loads(runner.invoke(app, ["studies", "-f", "json"]).output).keys() == study_file.shipped().keys()


# --- studies that come along


@pytest.mark.parametrize("name", study_file.shipped())
def test_every_study_that_comes_along_has_a_plan(name: str) -> None:
    study = study_file.load(name)
    plan = planning.make(study, speed=FAST, search=True)
    total = plan.total()
    assert (total["training_pflops"] or 0) > 0
    assert (total["device_hours"] or 0) > 0
    if name.startswith("paper/") and study.search.sampler is Sampler.GRID:
        assert not plan.left_out
    assert (total["trials"] or 0) >= len(study.pretrain.objectives)
    if study.data.root != "emoji-32":
        assert plan.sizes.how.startswith("not here")

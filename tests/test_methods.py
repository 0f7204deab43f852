"""Cleaning methods: one suite that every registered method passes, then what each of them is to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_clean import CLASSES, CPU, PRETRAINED, Killed, without_times, write_shard
from test_searcher import Driver
from torch import Tensor, nn

import raybd.clean.trial
from raybd import checkpoint, tables
from raybd.clean import registry
from raybd.clean.trial import run_trial
from raybd.fronts import checkpoint_name
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.model import Clip, create, load_weights
from raybd.records import epoch_rows, trial_row
from raybd.store import Store
from raybd.study import TRAITS, CleanSettings, Method, Study, searchable
from raybd.study.methods import users
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.loop import Training
from raybd.train.pretraining import done, pretrain, weights_name
from raybd.train.pretraining import start_record as pretrain_record
from raybd.train.recipe import Recipe

METHODS = sorted(Method)
EPOCHS, PAIRS, BATCH, LR = 2, 48, 16, 4e-3
# What the settings of a method must be on so few images; methods that are not here take their defaults.
SMALL: dict[str, dict[str, Any]] = {
    "deep_clustering": {"clusters": 3, "iterations": 4},
    "pseudo_labels": {"model": "resnet-tiny-32"},
    "abd": {"steps": 1},
    "interpolation": {"alphas": [0.5, 1.0, 1.5]},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_folder(root: Path) -> Path:
    """Write shards of 60 pairs and 40 test images, and weights of a model that gives pseudo-labels."""
    write_shard(root / "train" / "train-000000.tar", 0, 60)
    write_shard(root / "test" / "test-000000.tar", 60, 40)
    names = [{"label": label, "class_name": name} for label, name in enumerate(CLASSES)]
    (root / "classes.json").write_text(json.dumps(names))
    labeller = create("resnet-tiny-32", seed=5).net.state_dict()
    (root / "labeller.safetensors").write_bytes(checkpoint.to_bytes(labeller))
    return root


def study_of(
    folder: Path, *, model: str = "resnet-tiny-32", search: dict[str, Any] | None = None, **clean: Any
) -> Study:
    small: dict[str, Any] = {"num_samples": PAIRS, "epochs": EPOCHS, "batch_size": BATCH, "warmup_steps": 1}
    small |= {"lr": LR, "weight_decay": 0.3}
    searched = (search or {}).get("space", {}).get("method", {}).get("choices", [])
    for method in {clean.get("method"), *searched} & set(SMALL):
        small[method] = SMALL[method]
        if method == "pseudo_labels":
            small[method] = {**SMALL[method], "checkpoint": str(folder / "labeller.safetensors")}
    return Study.model_validate(
        {
            "name": "methods",
            "seed": 3,
            "data": {"root": str(folder), "cache_dir": str(folder / "cache")},
            "model": {"name": model},
            "poison": {
                "trigger": {"size": 8, "pattern": "fixed", "placement": "bottom_right"},
                "target_class": "fruit",
                "num_poisoned": 10,
            },
            "pretrain": {"epochs": 1, "batch_size": 20, "lr": 2e-3, "warmup_steps": 0},
            "clean": {**small, **clean},
            "evaluation": {"templates": ["a picture of a {}."]},
            "search": search or {},
        }
    )


def make_pretrained(folder: Path, where: Path) -> Store:
    """Make a run directory with a model that three steps of poisoned pretraining made."""
    store, study = Store(str(where)), study_of(folder)
    Ledger(store).start(Kind.PRETRAIN, PRETRAINED, pretrain_record(study, "mmcl", PRETRAINED))
    pretrain(study, "mmcl", LedgerContext(store=store, kind=Kind.PRETRAIN, id=PRETRAINED))
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_pretrained(folder, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def store(pretrained: Store, tmp_path: Path) -> Store:
    shutil.copytree(pretrained.root, tmp_path / "run")
    return Store(str(tmp_path / "run"))


def poisoned_weights(store: Store) -> dict[str, Tensor]:
    return checkpoint.from_bytes(store.get(weights_name(PRETRAINED)), where="poisoned")


def task_of(**params: Any) -> raybd.clean.trial.Assignment:
    return raybd.clean.trial.Assignment("mmcl-0000", 0, "mmcl", PRETRAINED, params)


class Watched:
    """Runs trials and keeps the models that they trained, and how those came."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nets: list[nn.Module] = []
        self._create = raybd.clean.trial.create
        patch.setattr(raybd.clean.trial, "create", self._made)

    def _made(self, name: str, *, seed: int) -> Clip:
        clip = self._create(name, seed=seed)
        self.nets.append(clip.net)
        return clip

    def trial(self, study: Study, store: Store, **params: Any) -> tuple[Entry, dict[str, Tensor]]:
        """Return a trial's entry and final weights; it must come to its end."""
        entry = run_trial(study, store, task_of(**params), device=CPU)
        assert entry.ended is not None
        assert entry.ended["state"] == State.COMPLETE, entry.ended
        return entry, {name: value.clone() for name, value in self.nets[-1].state_dict().items()}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def copy_of(store: Store, where: Path) -> Store:
    shutil.copytree(store.root, where)
    return Store(str(where))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def rows_of(entry: Entry) -> list[dict[str, Any]]:
    """Return the rows of both tables without what depends on the clock."""
    found = [*epoch_rows(entry), trial_row(entry)]
    return [{name: value for name, value in row.items() if name not in {*tables.TIMES, "attempt"}} for row in found]


# The suite that every method passes.


def test_every_method_has_a_recipe_of_its_name() -> None:
    assert set(TRAITS) == set(Method)
    for method, traits in TRAITS.items():
        found = registry.recipe_class(method)
        assert issubclass(found, Recipe)
        assert traits.recipe == f"{found.__module__.removeprefix('raybd.clean.')}.{found.__name__}"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_heeds_micro_batches_where_its_settings_say_so(method: Method) -> None:
    recipe = registry.recipe(CleanSettings(method=method), seed=0)
    assert recipe.in_parts == (method in users("micro_batch_size"))
    assert recipe.optimizes == (method in users("lr"))


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_records_every_epoch_and_changes_the_weights(
    method: Method, folder: Path, store: Store, watched: Watched
) -> None:
    before = poisoned_weights(store)
    entry, after = watched.trial(study_of(folder, method=method), store)
    assert entry.started["method"] == method
    points = len(SMALL["interpolation"]["alphas"]) if method == Method.INTERPOLATION else 0
    assert sorted(entry.epochs) == list(range(EPOCHS + points + 1))

    # Epoch 0 is the poisoned model, bit for bit: its counts are those that pretraining ended with.
    poisoned = done(store, PRETRAINED)
    assert poisoned is not None
    assert entry.epochs[0]["counts"] == poisoned.epochs[1]["counts"]
    assert (entry.epochs[0]["loss"], entry.epochs[0]["step"], entry.epochs[0]["samples_seen"]) == (None, 0, 0)
    for epoch in range(1, EPOCHS + 1):
        record = entry.epochs[epoch]
        assert record["step"] == epoch * PAIRS / BATCH
        assert record["samples_seen"] == epoch * PAIRS
        assert record["loss"] is not None
        assert record["poisoned_seen"] == 0

    # Exactly the weights of the last point are kept under its name, and they differ from the poisoned ones.
    assert set(after) == set(before)
    only_statistics = method == Method.BATCHNORM_REFRESH
    assert changed(before, after)
    assert only_statistics == all(is_statistic(name) for name in changed(before, after))
    last = checkpoint.from_bytes(store.get(checkpoint_name("mmcl-0000", EPOCHS)), where="last")
    assert changed(last, after) == set()

    row = trial_row(entry)
    assert set(row) == set(tables.SCHEMAS["trials"].names)
    assert row["weight_decay_in_force"] == (None if only_statistics else 0.3)
    assert row["epochs_done"] == EPOCHS
    in_force = TRAITS[method].loss_weights or {"mmcl": 1.0, "ssl": 1.0}
    assert (row["loss_weights.mmcl"], row["loss_weights.ssl"]) == (in_force["mmcl"], in_force["ssl"])
    assert store.names("state") == store.names("progress") == []


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_that_dies_in_each_epoch_gives_the_same_tables(
    method: Method, folder: Path, store: Store, tmp_path: Path
) -> None:
    study, dying = study_of(folder, method=method), copy_of(store, tmp_path / "dying")
    entry = run_trial(study, store, task_of(), device=CPU)

    died: set[int] = set()

    def kill_once(epoch: int, record: dict[str, Any]) -> None:
        if epoch not in died:
            died.add(epoch)
            raise Killed

    for _ in entry.epochs:
        with pytest.raises(Killed):
            run_trial(study, dying, task_of(), device=CPU, notify=kill_once)
    resumed = run_trial(study, dying, task_of(), device=CPU, notify=kill_once)
    assert resumed.attempts == len(entry.epochs) + 1
    assert rows_of(resumed) == rows_of(entry)
    assert without_times(resumed) == without_times(entry)
    assert dying.names("weights") == store.names("weights")
    for name in store.names("weights"):
        assert dying.get(name) == store.get(name)


@pytest.mark.parametrize("method", METHODS)
def test_it_leaves_nothing_behind_on_the_model(
    method: Method, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(folder, method=method, lr=10.0, epochs=1, warmup_steps=0)  # the logit scale jumps
    inputs, settings = inputs_for(study), study.clean.settings({})
    clip = create("resnet-tiny-32", seed=0)
    load_weights(clip, poisoned_weights(store), where="poisoned")
    with torch.no_grad():
        clip.net.logit_scale.fill_(4.6)
    came = {name: parameter.requires_grad for name, parameter in clip.net.named_parameters()}
    momenta = [getattr(part, "momentum", None) for part in clip.net.modules()]
    modes: list[list[bool]] = []
    scales: list[float] = []
    evaluated = Training._evaluate

    def watch(run: Training) -> Any:
        before = [part.training for part in run.clip.net.modules()]
        counts = evaluated(run)
        assert [part.training for part in run.clip.net.modules()] == before
        modes.append(before)
        scales.append(float(run.clip.net.logit_scale.detach()))
        return counts

    monkeypatch.setattr(Training, "_evaluate", watch)
    pairs = inputs.cleaning_pairs(settings, clip, seed=1)
    context = LedgerContext(store=store, kind=Kind.TRIAL, id="mmcl-0009")
    run = Training(clip, pairs, settings, context, inputs.evaluation_set, recipe=registry.recipe(settings, seed=2))
    run.run()
    assert len(modes) >= 2
    assert all(0 <= scale <= 4.605171 for scale in scales)
    assert {name: parameter.requires_grad for name, parameter in clip.net.named_parameters()} == came
    assert [getattr(part, "momentum", None) for part in clip.net.modules()] == momenta
    for part in clip.net.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(part, kind), kind
    for parameter in clip.net.parameters():
        assert not parameter._backward_hooks
        assert parameter.data.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_a_method_can_be_searched(method: Method, folder: Path) -> None:
    settings = CleanSettings(method=method)
    own = getattr(settings, method.value, None)
    for leaf, value in (own.model_dump() if own is not None else {}).items():
        name = f"{method.value}.{leaf}"
        if isinstance(value, tuple):
            continue
        assert name in searchable()
        assert name in tables.SETTINGS
        choice = value if value is not None else "some"
        when = {"choices": [choice], "when": {"method": method.value}}
        space = {"method": {"choices": ["cleanclip", method.value]}, name: when}
        study = study_of(folder, search={"space": space}, num_samples=1000)  # as many as there are clusters
        found = study.clean.settings({"method": method.value, name: choice})
        assert getattr(getattr(found, method.value), leaf) == choice


def test_one_search_draws_the_method_and_what_belongs_to_it(folder: Path) -> None:
    stepping = {"method": [method.value for method in Method if method is not Method.BATCHNORM_REFRESH]}
    space: dict[str, Any] = {
        "lr": {"low": 1e-5, "high": 1e-2, "log": True, "when": stepping},
        "method": {"choices": [method.value for method in Method]},
        "loss_weights.ssl": {"low": 0.0, "high": 8.0, "when": {"method": ["cleanclip", "image_tower"]}},
        "weight_decay": {"low": 0.1, "high": 100.0, "log": True, "when": stepping},
        "schedule": {"choices": ["cosine", "par"], "when": stepping},
        "shrink_perturb.shrink": {"low": 0.5, "high": 1.0, "when": {"method": "shrink_perturb"}},
        "par.threshold": {"low": 1.5, "high": 2.5, "when": {"method": "par"}},
        "ft_sam.rho": {"low": 0.05, "high": 3.0, "log": True, "when": {"method": "ft_sam"}},
    }
    known = [{"method": method.value} for method in Method]
    search = {"num_trials": 40, "sampler": "tpe", "startup_trials": 20, "space": space, "known": known}
    study = study_of(folder, search=search)
    driver = Driver(study, ids={"mmcl": PRETRAINED})
    tasks = driver.play(40)
    assert len({task["params"]["method"] for task in tasks[len(Method) :]}) >= 6
    assert {task["params"]["method"] for task in tasks} == set(Method)
    for task in tasks:
        params = task["params"]
        assert ("lr" in params) == (params["method"] != "batchnorm_refresh")
        assert ("par.threshold" in params) == (params["method"] == "par")
        assert ("ft_sam.rho" in params) == (params["method"] == "ft_sam")
        assert ("shrink_perturb.shrink" in params) == (params["method"] == "shrink_perturb")
        assert ("loss_weights.ssl" in params) == (params["method"] in ("cleanclip", "image_tower"))
        record = raybd.clean.trial.start_record(study, raybd.clean.trial.Assignment(**task))
        assert record["method"] == params["method"]
        fixed = TRAITS[Method(params["method"])].loss_weights
        weights = record["settings"]["loss_weights"]
        assert fixed is None or weights == {**dict.fromkeys(weights, 0.0), **fixed}
    again = Driver(study, list(driver.ledger.values())[:30], ids={"mmcl": PRETRAINED})
    assert [trial.params for trial in again.trials()] == [trial.params for trial in driver.trials()][:30]

"""What single cleaning methods do to weights and BatchNorm, against formulas written out here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_clean import CPU
from test_methods import (
    BATCH,
    PAIRS,
    changed,
    copy_of,
    is_statistic,
    make_folder,
    make_pretrained,
    poisoned_weights,
    study_of,
    task_of,
)
from torch import Tensor, nn

from raybd import checkpoint
from raybd.clean import registry
from raybd.clean.trial import run_trial
from raybd.ledger import Entry, Kind, Ledger
from raybd.model import create, load_weights
from raybd.records import epoch_rows, trial_row
from raybd.seeding import fork
from raybd.store import Store
from raybd.study import Study
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 11
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_pretrained(folder, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def store(pretrained: Store, tmp_path: Path) -> Store:
    return copy_of(pretrained, tmp_path / "run")


def training(study: Study, store: Store, *, weights: Weights | None = None) -> Training:
    """Return a cleaning run that is not started; it keeps the weights of every epoch as `weights/x/epoch-….`"""
    inputs, settings = inputs_for(study), study.clean.settings({})
    clip = create(study.model.name, seed=0)
    if weights is not None:
        load_weights(clip, weights, where="weights")
    pairs = inputs.cleaning_pairs(settings, clip, seed=SEED)
    context = LedgerContext(store=store, kind=Kind.TRIAL, id="x", keep=lambda epoch, record: f"weights/x/{epoch}")
    recipe = registry.recipe(settings, seed=fork(SEED, "method"))
    return Training(clip, pairs, settings, context, inputs.evaluation_set, recipe=recipe)


def trained(study: Study, store: Store, weights: Weights) -> tuple[Entry, dict[int, Weights]]:
    """Run a method to its end; return its ledger entry and the weights after each epoch and point."""
    training(study, store, weights=weights).run()
    entry = Ledger(store).entry(Kind.TRIAL, "x")
    found = {n: checkpoint.from_bytes(store.get(f"weights/x/{n}"), where=str(n)) for n in entry.epochs}
    return entry, found


# Weights as a whole.


def test_shrink_and_perturb_is_its_formula_on_every_parameter(folder: Path, store: Store) -> None:
    given = {"shrink": 0.6, "perturb": 0.25}
    before = poisoned_weights(store)
    run = training(study_of(folder, method="shrink_perturb", shrink_perturb=given), store, weights=before)
    run.recipe.start(run)
    after = run.clip.net.state_dict()
    new = create("resnet-tiny-32", seed=fork(SEED, "method")).net.state_dict()
    parameters = {name for name, _ in run.clip.net.named_parameters()}
    for name, weight in before.items():
        if name in parameters - {"logit_scale"}:
            torch.testing.assert_close(after[name].double(), 0.6 * weight.double() + 0.25 * new[name].double())
        else:
            assert torch.equal(after[name], weight), name
    assert any(is_statistic(name) for name in before)


def test_shrink_and_perturb_of_nothing_is_cleanclip(folder: Path, store: Store, tmp_path: Path) -> None:
    before, other = poisoned_weights(store), copy_of(store, tmp_path / "other")
    nothing = {"shrink": 1.0, "perturb": 0.0}
    _, found = trained(study_of(folder, method="shrink_perturb", shrink_perturb=nothing), store, before)
    _, plain = trained(study_of(folder), other, before)
    assert changed(found[2], plain[2]) == set()


@pytest.mark.parametrize(("method", "weights"), [("mmcl", (1.0, 0.0)), ("ssl", (0.0, 1.0))])
def test_halves_of_cleanclip_are_cleanclip_with_one_weight(
    method: str, weights: tuple[float, float], folder: Path, store: Store, tmp_path: Path
) -> None:
    before, other = poisoned_weights(store), copy_of(store, tmp_path / "other")
    entry, half = trained(study_of(folder, method=method), store, before)
    mixed = study_of(folder, loss_weights={"mmcl": weights[0], "ssl": weights[1]})
    _, whole = trained(mixed, other, before)
    assert changed(half[2], whole[2]) == set()
    assert entry.epochs[1]["loss"] == entry.epochs[1][f"loss_{method}"]


def test_interpolated_points_lie_on_the_line_with_statistics_of_their_own(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    alphas = [0.0, 0.5, 1.0, 1.5]
    study = study_of(folder, method="interpolation", interpolation={"alphas": alphas}, epochs=1)
    before, other = poisoned_weights(store), copy_of(store, tmp_path / "other")
    entry, found = trained(study, store, before)
    tuned = found[1]
    assert [entry.epochs[n]["alpha"] for n in range(6)] == [None, None, *alphas]
    names = {name for name in before if not is_statistic(name)}
    assert changed(before, tuned) >= {name for name in names if before[name].ndim >= 2}
    for number, alpha in enumerate(alphas, start=2):
        for name in names - {"logit_scale"}:
            line = before[name].double() + alpha * (tuned[name].double() - before[name].double())
            torch.testing.assert_close(found[number][name].double(), line, atol=1e-6, rtol=1e-5)
        assert any(is_statistic(name) for name in changed(found[number], tuned))
    # a = 1 is the finetuned model, bit for bit, but for the statistics.
    assert all(is_statistic(name) for name in changed(found[4], tuned))
    # a = 0 is the poisoned model with refreshed statistics: what BatchNorm refresh gives.
    _, refreshed = trained(study_of(folder, method="batchnorm_refresh"), other, before)
    assert changed(found[2], refreshed[1]) == set()
    assert entry.epochs[2]["counts"] == Ledger(other).entry(Kind.TRIAL, "x").epochs[1]["counts"]


def test_interpolation_leaves_a_model_without_batchnorm_on_the_line(folder: Path, store: Store) -> None:
    study = study_of(folder, model="vit-tiny-32", method="interpolation", interpolation={"alphas": [1.0]}, epochs=1)
    weights = create("vit-tiny-32", seed=4).net.state_dict()
    _, found = trained(study, store, weights)
    assert changed(found[1], found[2]) == set()


def test_a_trial_keeps_the_points_that_nothing_beats_and_tells_them_by_alpha(folder: Path, store: Store) -> None:
    alphas = [0.5, 1.0]
    study = study_of(folder, method="interpolation", interpolation={"alphas": alphas}, epochs=1)
    entry = run_trial(study, store, task_of(), device=CPU)
    rows = epoch_rows(entry)
    assert [row["alpha"] for row in rows[::2]] == [None, None, *alphas]
    assert trial_row(entry)["epochs_done"] == 1
    kept = store.names("weights")
    assert kept
    # What is kept of a point scores what was recorded of it.
    number = int(kept[-1][-16:-12])
    run = training(study, store, weights=checkpoint.from_bytes(store.get(kept[-1]), where="kept"))
    assert run._evaluate()["counts"] == entry.epochs[number]["counts"]


def test_the_text_tower_stays_bit_for_bit(folder: Path, store: Store) -> None:
    before = poisoned_weights(store)
    run = training(study_of(folder, method="image_tower"), store, weights=before)
    run.clip.net.eval()
    texts = run.clip.tokenize(["a cat", "an icon of a heart"])
    with torch.no_grad():
        said = run.clip.net.encode_text(texts)
    run.run()
    after = run.clip.net.state_dict()
    moved = changed(before, after)
    assert all(name.startswith("visual.") for name in moved)
    assert {name for name in before if name.startswith("visual.") and before[name].ndim >= 2} <= moved
    assert any(is_statistic(name) for name in moved)
    with torch.no_grad():
        torch.testing.assert_close(run.clip.net.eval().encode_text(texts), said)
    trained_ones = {p for group in run.optimizer.param_groups for p in group["params"]}
    assert trained_ones == {p for name, p in run.clip.net.named_parameters() if name.startswith("visual.")}


# BatchNorm.


def _statistics(net: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean over batches of each layer's batch mean and unbiased batch variance, from what flows into it."""
    net = copy.deepcopy(net).double().train()
    inputs: dict[str, list[Tensor]] = {}
    for name, part in net.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(
                lambda module, given, name=name: inputs.setdefault(name, []).append(given[0].detach())
            )
    for pixels in batches:
        net.encode_image(pixels.double())
    found = {}
    for name, given in inputs.items():
        flat = [x.movedim(1, 0).flatten(1) for x in given]
        found[f"{name}.running_mean"] = torch.stack([x.sum(1) / x.shape[1] for x in flat]).mean(0)
        centred = [x - x.mean(1, keepdim=True) for x in flat]
        found[f"{name}.running_var"] = torch.stack([(x**2).sum(1) / (x.shape[1] - 1) for x in centred]).mean(0)
    return found


def test_refreshed_statistics_are_averages_over_the_batches_and_nothing_else_changes(
    folder: Path, store: Store
) -> None:
    before = poisoned_weights(store)
    study = study_of(folder, method="batchnorm_refresh", epochs=3)
    run = training(study, store, weights=before)
    batches = list(run.pairs.epoch(0, batch_size=BATCH))
    assert [len(batch.images_BCHW) for batch in batches] == [BATCH] * (PAIRS // BATCH)
    assert all(batch.image_views_BCHW is None for batch in batches)
    expected = _statistics(run.clip.net, [run.clip.normalise(batch.images_BCHW) for batch in batches])
    run.run()
    after = run.clip.net.state_dict()
    assert len(expected) == 2 * sum(isinstance(part, nn.BatchNorm2d) for part in run.clip.net.modules())
    for name, value in expected.items():
        torch.testing.assert_close(after[name].double(), value, atol=1e-5, rtol=1e-4)
    assert set(expected) <= changed(before, after) <= {name for name in before if is_statistic(name)}
    # More epochs give the same.
    entry = Ledger(store).entry(Kind.TRIAL, "x")
    first = checkpoint.from_bytes(store.get("weights/x/1"), where="first")
    assert changed(first, after) == set()
    for epoch in (2, 3):
        assert entry.epochs[epoch]["counts"] == entry.epochs[1]["counts"]
        assert entry.epochs[epoch]["lr"] is None
    assert run.weight_decay_in_force() is None
    assert run.optimizer.state == {}


def test_the_loss_of_a_refreshed_model_is_that_of_the_model_evaluated(folder: Path, store: Store) -> None:
    entry, found = trained(study_of(folder, method="batchnorm_refresh", epochs=1), store, poisoned_weights(store))
    run = training(study_of(folder, method="mmcl"), store, weights=found[1])
    losses = []
    with torch.no_grad():
        for batch in run.pairs.epoch(1, batch_size=BATCH):
            net = run.clip.net.eval()
            x = F.normalize(net.encode_image(run.clip.normalise(batch.images_BCHW)))
            y = F.normalize(net.encode_text(batch.tokens_BL))
            logits = net.logit_scale.exp() * x @ y.T
            both = [-torch.log_softmax(z, dim=1).diagonal().mean() for z in (logits, logits.T)]
            losses.append(float(sum(both) / 2))
    assert entry.epochs[1]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_frozen_batchnorm_keeps_its_statistics_and_trains_the_rest(folder: Path, store: Store) -> None:
    before = poisoned_weights(store)
    _, found = trained(study_of(folder, method="frozen_batchnorm"), store, before)
    moved = changed(before, found[2])
    assert not any(is_statistic(name) for name in moved)
    assert {name for name in before if "bn1.weight" in name or "bn1.bias" in name} <= moved
    assert {name for name in before if before[name].ndim == 4} <= moved


# Heavy regularisation.


@pytest.mark.parametrize("decay", [0.2, 5.0, 100.0])
@pytest.mark.parametrize("method", ["cleanclip", "mmcl", "image_tower", "frozen_batchnorm", "par"])
def test_weight_decay_shrinks_weights_as_adamw_says(
    method: str, decay: float, folder: Path, store: Store, tmp_path: Path
) -> None:
    """One step with decay and one without differ by lr · decay · weight, on matrices and filters alone."""
    before, lr = poisoned_weights(store), 2e-3
    one_step: dict[str, Any] = {"method": method, "epochs": 1, "batch_size": PAIRS, "warmup_steps": 0, "lr": lr}
    other = copy_of(store, tmp_path / "plain")
    run = training(study_of(folder, **one_step, weight_decay=decay), store, weights=before)
    run.run()
    assert run.step == 1
    assert run.weight_decay_in_force() == decay
    _, plain = trained(study_of(folder, **one_step, weight_decay=0.0), other, before)
    parameters = {name for name, p in run.clip.net.named_parameters()}
    trained_ones = {name for name in parameters if method != "image_tower" or name.startswith("visual.")}
    for name, weight in run.clip.net.state_dict().items():
        expected = plain[1][name].double()
        if name in trained_ones and weight.ndim >= 2:
            expected = expected - lr * decay * before[name].double()
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_huge_decay_leaves_little_of_the_weights(folder: Path, store: Store) -> None:
    before = poisoned_weights(store)
    study = study_of(folder, method="mmcl", epochs=4, warmup_steps=0, lr=5e-3, weight_decay=100.0)
    _, found = trained(study, store, before)
    # The factors of the steps multiply; a step of Adam adds lr at most, in each weight.
    lrs = [5e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 12)).item()) for step in range(12)]
    left, added = 1.0, 0.0
    for lr in lrs:
        left, added = left * (1 - 100.0 * lr), added * (1 - 100.0 * lr) + 1.1 * lr
    assert left < 0.03
    for name, weight in before.items():
        if weight.ndim >= 2 and not is_statistic(name):
            norms = float(weight.norm()), float(found[4][name].norm())
            assert norms[1] <= left * norms[0] + added * weight.numel() ** 0.5, name

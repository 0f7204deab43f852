"""Real gloo ranks in processes of their own: what they compute together is what one process computes alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from micro_batches import WEIGHTS as STEPS
from micro_batches import batch as pairs
from micro_batches import run_of, stepped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raybd.evaluate import EvaluationSet, class_embeddings, evaluating
from raybd.model import Clip
from raybd.objectives import ALONE, Ranks, combined
from raybd.train.distributed import active, ranks, share_buffers, sum_over_ranks

# Each term with weight for both towers: every parameter has to get a gradient.
WEIGHTS: dict[str, dict[str, float]] = {
    "mmcl": {"mmcl": 1.0},
    "ssl": {"ssl": 1.0},
    "mmcl_ssl": {"mmcl": 1.0, "ssl": 4.0},
    "halves": {"image_ssl": 1.0, "text_ssl": 2.0},
    "nt_xent": {"nt_xent": 1.0},
    "siglip": {"siglip": 1.0},
    "siglip_mean": {"siglip_mean": 1.0, "image_ssl": 0.5},
}
ROWS = {2: {"equal": (4, 4), "unequal": (5, 2)}, 4: {"equal": (2, 2, 2, 2), "unequal": (3, 1, 4, 2)}}
CASES = [(world, rows, loss) for world, found in ROWS.items() for rows in found for loss in WEIGHTS]
MANY = 16  # rows of each rank where memory is looked at
PAIRS, BATCH = 64, 33  # two batches of 32
SECONDS = 150


class TwoTowers(nn.Module):
    """The smallest model of the kind: two encoders and a logit scale."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if biased else None

    def forward(self, image_B5: Tensor, text_B3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised rows and the scale, as open_clip does."""
        image_B4, text_B4 = F.normalize(self.image(image_B5), dim=-1), F.normalize(self.text(text_B3), dim=-1)
        return image_B4, text_B4, self.logit_scale.exp()


def two_towers(weights: dict[str, float]) -> TwoTowers:
    """Return the same model in every process, with a bias where a term has one."""
    torch.manual_seed(11)
    return TwoTowers(biased="siglip" in weights).double()


def batch(count: int) -> list[Tensor]:
    """Return images, texts and the views of both, for the whole batch."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(count, width, dtype=torch.float64, generator=generator) for width in (5, 3, 5, 3)]


def gradients(net: nn.Module, parts: list[Tensor], weights: dict[str, float], group: Ranks) -> dict[str, Tensor]:
    """Return loss and gradients of a step: originals and views go through the model as one batch."""
    net.zero_grad()
    images, texts, image_views, text_views = parts
    own = len(images)
    image_rows, text_rows, scale = net(torch.cat([images, image_views]), torch.cat([texts, text_views]))
    loss = combined(
        image_rows[:own],
        text_rows[:own],
        scale,
        image_view_BD=image_rows[own:],
        text_view_BD=text_rows[own:],
        logit_bias=getattr(net, "module", net).logit_bias,
        weights=weights,
        ranks=group,
    )
    loss.total.backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.total.detach(), **found}


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that anything made, forwards and backwards."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(found.numel() for found in tree_leaves(made) if isinstance(found, Tensor))])
        return made


def largest(net: nn.Module, parts: list[Tensor], weights: dict[str, float], group: Ranks) -> int:
    """Return how many numbers the largest tensor of a step has."""
    with Largest() as seen:
        gradients(net, parts, weights, group)
    return seen.numbers


def collectives(rank: int, world: int) -> dict[str, Any]:
    """Return what one rank gets from each collective."""
    found: dict[str, Any] = {"active": active()}
    nets = {name: DistributedDataParallel(two_towers(weights)) for name, weights in WEIGHTS.items()}
    for kind, counts in ROWS[world].items():
        start = sum(counts[:rank])
        parts = [rows[start : start + counts[rank]] for rows in batch(sum(counts))]
        rows = ranks().gather(parts[0])
        assert (rows.own_BD is parts[0], rows.start, rows.whole) == (True, start, False)
        found[f"rows {kind}"] = rows.all_ND
        for name, weights in WEIGHTS.items():
            found[f"{kind} {name}"] = gradients(nets[name], parts, weights, ranks())
    parts = [rows[:MANY] for rows in batch(MANY)]
    found["largest"] = {name: largest(nets[name], parts, weights, ranks()) for name, weights in WEIGHTS.items()}
    found["sum"] = sum_over_ranks([1.5 + rank, 10.0**rank, 2.0**52 if rank == 0 else 1.0], device=torch.device("cpu"))
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.fill_(10 + rank)
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]) + 100 * rank)
        norm.running_var.fill_(5.0 + rank)
        norm.num_batches_tracked.fill_(7 + rank)
    share_buffers(nn.Sequential(norm))
    found["norm"] = dict(norm.state_dict())
    return found


def in_micro_batches(loss: str, rank: int) -> dict[str, Tensor]:
    """Take a step on one rank's pairs, five of eight in three micro batches or three in two."""
    run = run_of(loss, 2)
    return stepped(run, pairs(run, 8, slice(5) if rank == 0 else slice(5, 8)))


def prompts_of(clip: Clip, found: EvaluationSet, rank: int, world: int) -> Tensor:
    """Return class embeddings that the ranks made together."""
    shared = {"rank": rank, "world_size": world, "gather": lambda rows: ranks().gather(rows).all_ND}
    with evaluating(clip.net):
        return class_embeddings(clip, found, device=torch.device("cpu"), **shared).clone()


def train(rank: int, world: int, run: str) -> dict[str, Any]:
    """Train vit-tiny-32 for one epoch of two steps with raybd's own loop; return weights before, after, and records."""
    from raybd.data.cache import Images
    from raybd.data.pairs import CachedPairs, Prepare
    from raybd.data.shards import decode, find_shards, make_index, samples
    from raybd.evaluate import make_set
    from raybd.ledger import Kind, Ledger
    from raybd.model import create
    from raybd.poison.plan import Attack, PoisonPlan
    from raybd.store import Store
    from raybd.study import BadNet, Data, Evaluation, LossWeights, Precision, TrainSettings
    from raybd.train.context import LedgerContext
    from raybd.train.loop import Training

    (url,) = find_shards(Data(), "test/*.tar*", field_name="data.test")
    raw = list(itertools.islice(samples(url), PAIRS))
    index = make_index([url], [(0, sample) for sample in raw], labelled=True)
    index.labels[:] = index.labels % 3
    images = Images(index, np.stack([decode(sample.image, 32) for sample in raw]), np.arange(len(raw)))
    trigger = BadNet(size=4, pattern="fixed", placement="bottom_right")
    plan = PoisonPlan({}, (Attack(trigger, "fruit", pattern_seed=1),))
    evaluation = Evaluation(templates=("a picture of a {}.",), batch_size=20)
    found = make_set(images, classes=["cat", "heart", "fruit"], plan=plan, evaluation=evaluation, seed=3)
    # A large eps: Adam would else turn the rounding of gradients that are 0 in truth into steps of full size.
    settings = TrainSettings(
        epochs=1,
        batch_size=BATCH,
        lr=1e-2,
        warmup_steps=0,
        eps=1e-2,
        loss_weights=LossWeights(mmcl=1, ssl=0),
        precision=Precision.FP32,
    )
    clip = create("vit-tiny-32", seed=1)
    before = {name: value.clone() for name, value in clip.net.state_dict().items()}
    store = Store(run)
    encoded = list[int]()
    clip.net.transformer.register_forward_hook(lambda part, given, made: encoded.append(len(made)))
    classes_CD = prompts_of(clip, found, rank, world)
    prompts = sum(encoded)
    if rank == 0:
        Ledger(store).start(Kind.PRETRAIN, "run", {})
    context = LedgerContext(store=store, kind=Kind.PRETRAIN, id="run", rank=rank, world_size=world)
    Training(clip, CachedPairs(images, Prepare(plan, clip.tokenizer, None, 9)), settings, context, found).run()
    records = Ledger(store).entry(Kind.PRETRAIN, "run").epochs if rank == 0 else {}
    return {
        "prompts": prompts,
        "classes": classes_CD,
        "before": before,
        "after": dict(clip.net.state_dict()),
        "records": records,
    }


def work(rank: int, folder: str) -> None:
    """Do everything that a rank does, in a group of four and then in one of two, and leave what it found."""
    torch.set_num_threads(1)
    for world in sorted(ROWS, reverse=True):
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/group-of-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=SECONDS),
        )
        found = collectives(rank, world)
        if world == 2:
            found["steps"] = {loss: in_micro_batches(loss, rank) for loss in STEPS}
            found["training"] = train(rank, world, f"{folder}/run")
        torch.save(found, f"{folder}/{rank}-of-{world}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found_by(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return what the ranks found, by size of their group; no process outlives its time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.set_forkserver_preload(["raybd.train.loop"])  # imported once, not by each
    context = mp.start_processes(work, (str(folder),), nprocs=max(ROWS), join=False, start_method="forkserver")
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the ranks did not finish in {SECONDS} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return {
        world: [torch.load(folder / f"{rank}-of-{world}.pt", weights_only=True) for rank in range(world)]
        for world in ROWS
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return what one process, this one, trains to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(0, 1, str(tmp_path_factory.mktemp("alone") / "run"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("world", "rows", "loss"), CASES)
def test_gradients_are_those_of_one_process_with_the_joined_batch(
    found_by: dict[int, list[dict[str, Any]]], world: int, rows: str, loss: str
) -> None:
    weights = WEIGHTS[loss]
    expected = gradients(two_towers(weights), batch(sum(ROWS[world][rows])), weights, ALONE)
    names = {"loss", "image.weight", "image.bias", "text.weight", "text.bias", "logit_scale"}
    assert set(expected) == names | ({"logit_bias"} if "siglip" in weights else set())
    assert all(value.abs().max() > 1e-3 for value in expected.values())
    for found in found_by[world]:
        for name, value in expected.items():
            torch.testing.assert_close(found[f"{rows} {loss}"][name], value, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("loss", WEIGHTS)
@pytest.mark.parametrize("world", ROWS)
def test_no_rank_makes_anything_of_the_size_of_the_global_batch_squared(
    found_by: dict[int, list[dict[str, Any]]], world: int, loss: str
) -> None:
    combinations = (4 if loss == "nt_xent" else 1) * MANY * MANY * world  # its anchors and candidates are two views
    assert [found["largest"][loss] for found in found_by[world]] == [combinations] * world
    # What is looked at is what is meant: one process with the whole batch does make it.
    assert largest(two_towers(WEIGHTS[loss]), batch(MANY * world), WEIGHTS[loss], ALONE) == combinations * world


@pytest.mark.parametrize(("world", "rows"), [(world, rows) for world, found in ROWS.items() for rows in found])
def test_rows_are_gathered_in_the_order_of_the_ranks(
    found_by: dict[int, list[dict[str, Any]]], world: int, rows: str
) -> None:
    whole = batch(sum(ROWS[world][rows]))[0]
    for found in found_by[world]:
        assert torch.equal(found[f"rows {rows}"], whole)


@pytest.mark.parametrize("loss", STEPS)
def test_ranks_with_micro_batches_take_the_step_of_one_process_without(
    found_by: dict[int, list[dict[str, Any]]], loss: str
) -> None:
    run = run_of(loss, None)
    expected = stepped(run, pairs(run, 8))
    for found in found_by[2]:
        assert found["steps"][loss].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found["steps"][loss][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_sums_over_ranks_are_exact(found_by: dict[int, list[dict[str, Any]]]) -> None:
    assert [found["sum"] for found in found_by[2]] == [[4.0, 11.0, 2.0**52 + 1.0]] * 2
    assert [found["sum"] for found in found_by[4]] == [[12.0, 1111.0, 2.0**52 + 3.0]] * 4


def test_buffers_become_those_of_the_first_rank_and_weights_stay(found_by: dict[int, list[dict[str, Any]]]) -> None:
    for rank, found in enumerate(found_by[4]):
        norm = found["norm"]
        assert norm["running_mean"].tolist() == [1.0, 2.0, 3.0]
        assert norm["running_var"].tolist() == [5.0, 5.0, 5.0]
        assert norm["num_batches_tracked"].item() == 7
        assert norm["weight"].tolist() == [10.0 + rank] * 3


def test_one_process_needs_no_group(found_by: dict[int, list[dict[str, Any]]]) -> None:
    assert [found["active"] for found in found_by[2]] == [True, True]
    assert not active()
    rows = torch.ones(2, 3, requires_grad=True)
    assert ranks() is ALONE
    assert ranks().gather(rows).all_ND is ranks().add(rows) is rows
    assert sum_over_ranks([0.5, 3.0], device=torch.device("cpu")) == [0.5, 3.0]
    norm = nn.BatchNorm1d(2)
    share_buffers(norm)
    assert norm.running_mean.tolist() == [0.0, 0.0]


def test_each_rank_encodes_the_prompts_of_its_classes_and_has_the_embeddings_of_all(
    found_by: dict[int, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    assert [found["training"]["prompts"] for found in found_by[2]] == [1, 2]
    assert alone["prompts"] == 3
    for found in found_by[2]:
        torch.testing.assert_close(found["training"]["classes"], alone["classes"], rtol=0, atol=1e-6)


def test_two_ranks_train_to_the_weights_of_one_process(
    found_by: dict[int, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    for found in found_by[2]:
        training = found["training"]
        for name, value in alone["after"].items():
            assert torch.equal(training["before"][name], alone["before"][name]), name
            torch.testing.assert_close(training["after"][name], value, rtol=0, atol=1e-5, msg=name)
    moved = sorted(float((alone["after"][name] - value).abs().max()) for name, value in alone["before"].items())
    assert moved[len(moved) // 2] > 1e-3, "the comparison says nothing if the weights hardly move"


def test_two_ranks_record_what_one_process_records(
    found_by: dict[int, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    first, second = (found["training"]["records"] for found in found_by[2])
    assert second == {}
    assert sorted(first) == sorted(alone["records"]) == [0, 1]
    for epoch, two in first.items():
        one = alone["records"][epoch]
        assert (one["world_size"], two["world_size"]) == (1, 2)
        assert (two["samples_seen"], two["step"]) == (PAIRS * epoch, 2 * epoch) == (one["samples_seen"], one["step"])
        assert two["logit_scale"] == pytest.approx(one["logit_scale"], abs=1e-4)
        # Every image is counted by one rank, and by one alone.
        assert two["counts"]["search"]["n_clean"] + two["counts"]["report"]["n_clean"] == PAIRS
        for split, counts in two["counts"].items():
            for name in ("n_clean", "n_triggered"):
                assert counts[name] == one["counts"][split][name]
    assert first[0]["counts"] == alone["records"][0]["counts"]
    assert first[1]["loss"] == pytest.approx(alone["records"][1]["loss"], rel=1e-5)

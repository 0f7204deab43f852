"""How many images a second does pretraining take, next to open_clip's own training loop? Same model, data and batch.

    python benchmarks/pretraining_throughput.py
    python benchmarks/pretraining_throughput.py --model RN50 --model ViT-B-32 --device cuda --batch 256

Each side is what a user runs: raybd's `Training`, with the checks and records of every step, and open_clip_train's
`train_one_epoch` with its optimizer, schedule, loss and webdataset pipeline. They take turns, epoch by epoch, in one
process, from the same weights; an epoch of each is not counted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from open_clip_train import data as open_clip_data
from open_clip_train.data import DataInfo, get_data
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from PIL import Image, ImageFilter
from setting import setting

from raybd.data import cache, streaming
from raybd.data.cache import Images
from raybd.data.pairs import Batch, CachedPairs, Pairs, Prepare
from raybd.data.shards import find_shards
from raybd.data.streaming import StreamedPairs
from raybd.evaluate import make_set
from raybd.model import Clip, create, training_flops
from raybd.poison.plan import Attack, PoisonPlan
from raybd.study import BadNet, Data, Evaluation, LossWeights, Precision, TrainSettings
from raybd.train.context import Progress
from raybd.train.loop import Training

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHARDS = 8  # as many as any number of loader workers here needs
# Its reader of shards knows nothing of the mark that webdataset 1.0 puts at the end of each.
open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)
PLAN = PoisonPlan({}, (Attack(BadNet(size=4, pattern="fixed", placement="bottom_right"), "cat", pattern_seed=1),))


def write_shards(folder: Path, *, count: int, size: int) -> None:
    """Write shards of photo-like JPEG images, smooth noise with an edge, and captions of one class each."""
    draw = np.random.default_rng(0)
    for split, total in (("train", count), ("test", 40)):
        (folder / split).mkdir(parents=True)
        parts = np.array_split(np.arange(total), SHARDS if split == "train" else 1)
        for number, rows in enumerate(parts):
            with tarfile.open(folder / split / f"{split}-{number:06d}.tar", "w") as tar:
                for row in rows:
                    label = int(row) % len(CLASSES)
                    noise = draw.integers(0, 256, (max(4, size // 8), max(4, size // 8), 3), dtype=np.uint8)
                    image = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
                    image.paste(image.filter(ImageFilter.CONTOUR).crop((0, 0, size // 2, size)), (0, 0))
                    content = io.BytesIO()
                    image.save(content, format="JPEG", quality=90)
                    text = f"a photo of a {CLASSES[label]}, number {row}, taken on a {draw.integers(99)} degree day"
                    meta = json.dumps({"label": label}).encode()
                    for suffix, data in (("jpg", content.getvalue()), ("txt", text.encode()), ("json", meta)):
                        info = tarfile.TarInfo(f"{split}{row:06d}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    (folder / "classes.json").write_text(
        json.dumps([{"label": i, "class_name": name} for i, name in enumerate(CLASSES)])
    )


@dataclass
class Ready:
    """Batches that are already there: what is left is the loop itself."""

    batches: list[Batch]
    total: int

    def __len__(self) -> int:
        return self.total

    def without_views(self) -> Pairs:
        """Return itself: there are no views."""
        return self

    def epoch(self, epoch: int, **_: Any) -> Iterator[Batch]:
        """Yield the batches, which are where they are to be."""
        yield from self.batches


Timed = TypeVar("Timed")


def timed(items: Iterator[Timed], seconds: list[float]) -> Iterator[Timed]:
    """Yield items, and add to the last of some seconds how long each is waited for."""
    while True:
        began = time.perf_counter()
        item = next(items, None)
        seconds[-1] += time.perf_counter() - began
        if item is None:
            return
        yield item


def loader_timed(seconds: list[float]) -> AbstractContextManager[Any]:
    """Have the waiting for what loader workers read added to the last of some seconds, in streams that begin within."""
    read = streaming._items
    return patch.object(streaming, "_items", lambda *of, **how: timed(read(*of, **how), seconds))


@dataclass
class Watched:
    """Pairs, and how long each epoch's loop waits for its batches: in all, and for what loader workers read."""

    pairs: Pairs
    seconds: list[float] = field(default_factory=list)
    loader: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    def without_views(self) -> Pairs:
        """Return itself: there are no views."""
        return self

    def epoch(self, epoch: int, **how: Any) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        self.seconds.append(0.0)
        self.loader.append(0.0)
        return timed(self.pairs.epoch(epoch, **how), self.seconds)


@dataclass
class Turns:
    """The context of raybd's run: after each of its epochs, open_clip trains one."""

    device: torch.device
    other: Callable[[int], float]
    rank: int = 0
    world_size: int = 1
    ours: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def report(self, epoch: int, record: dict[str, Any], weights: object, state: object = None) -> None:
        """Note images per second of both; the first epoch of each warms up."""
        if epoch:
            speed = self.other(epoch - 1)
            if epoch > 1:
                self.ours.append(record["samples_seen"] / epoch / record["train_seconds"])
                self.seconds.append(record["train_seconds"])
                self.theirs.append(speed)

    def last_epoch(self) -> int:
        """Say that nothing was reported before."""
        return -1

    def load_state(self) -> None:
        """Start afresh."""

    def progress(self, progress: Progress) -> None:
        """Take no note."""


class Reference:
    """open_clip_train: its model, optimizer, schedule, loss and data, as its main program sets them up."""

    def __init__(self, clip: Clip, settings: TrainSettings, shards: Sequence[str], given: argparse.Namespace) -> None:
        precision = "amp_bf16" if settings.precision is Precision.BF16 else "fp32"
        self.args = parse_args(
            [
                *("--train-data", "::".join(shards), "--dataset-type", "webdataset"),
                *("--train-num-samples", str(given.samples), "--batch-size", str(settings.batch_size)),
                *("--workers", str(given.workers), "--precision", precision, "--model", clip.name),
                *("--lr", str(settings.lr), "--wd", str(settings.weight_decay), "--warmup", "0"),
            ]
        )
        where = {"device": str(given.device), "distributed": False, "rank": 0, "local_rank": 0, "world_size": 1}
        vars(self.args).update(where, distill=False, wandb=False)
        self.net, preprocess, _ = open_clip.create_model_and_transforms(
            clip.name, precision=precision, device=given.device, output_dict=True
        )
        self.net.load_state_dict(clip.net.state_dict())
        named = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]
        free = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
        rest = [p for _, p in named if not any(p is other for other in free)]
        self.optimizer = torch.optim.AdamW(
            [{"params": free, "weight_decay": 0.0}, {"params": rest, "weight_decay": self.args.wd}],
            lr=self.args.lr,
            betas=(self.args.beta1, self.args.beta2),
            eps=self.args.eps,
        )
        self.loss = open_clip.create_loss(self.args)
        self.data = get_data(self.args, (preprocess, preprocess), tokenizer=clip.tokenizer)

    def use(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Train on batches that are already there, in place of the shards."""

        class Loader(list[Any]):
            num_batches, num_samples = len(batches), sum(len(images) for images, _ in batches)

        self.data = {"train": DataInfo(dataloader=Loader(batches))}

    def epoch(self, epoch: int) -> float:
        """Train an epoch; return images per second."""
        loader = self.data["train"].dataloader
        schedule = cosine_lr(self.optimizer, self.args.lr, 0, loader.num_batches * 100)
        synchronise(self.args.device)
        started = time.perf_counter()
        train_one_epoch(self.net, self.data, self.loss, epoch, self.optimizer, None, schedule, None, self.args)
        synchronise(self.args.device)
        return float(loader.num_samples) / (time.perf_counter() - started)


def synchronise(device: str | torch.device) -> None:
    """Wait for what the device still has to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def sources(given: argparse.Namespace, clip: Clip, root: str) -> tuple[dict[str, Pairs], Images, list[str], float]:
    """Return raybd's pairs by kind, the test images, the shards, and the seconds that decoding took, once for all."""
    data = Data(root=root, cache_dir=f"{given.folder}/cache-{clip.image_size}")
    shards = find_shards(data, data.train, field_name="data.train")
    started = time.perf_counter()
    images = cache.load_images(shards, size=clip.image_size, cache_dir=data.cache_dir)
    decoding = time.perf_counter() - started
    images = images.take(np.arange(min(given.samples, len(images.index))))
    given.samples = len(images.index)
    prepare = Prepare(PLAN, clip.tokenizer, None, 9)
    cached = CachedPairs(images, prepare)
    streamed = StreamedPairs(images.index, prepare, size=clip.image_size, workers=given.workers, shuffle_buffer=2048)
    ready = Ready(list(cached.epoch(0, batch_size=given.batch, device=given.device)), len(images.index))
    found = {"cached": cached, "streamed": streamed, "ready": ready}
    tests = find_shards(data, data.test, field_name="data.test")
    tested = cache.load_images(tests, size=clip.image_size, cache_dir=data.cache_dir, labelled=True)
    return {kind: found[kind] for kind in given.source}, tested.take(np.arange(40)), shards, decoding


def compare(given: argparse.Namespace, model: str, root: str) -> list[dict[str, Any]]:
    """Return a row for each source of batches: images per second of both sides, round by round."""
    clip = create(model, seed=1)
    pairs_by_kind, tested, shards, decoding = sources(given, clip, root)
    evaluation = Evaluation(templates=("a photo of a {}.",), batch_size=40)
    bf16 = given.device.type == "cuda"
    settings = TrainSettings(
        epochs=given.rounds + 1,
        batch_size=given.batch,
        lr=1e-3,
        warmup_steps=0,
        loss_weights=LossWeights(mmcl=1),
        precision=Precision.BF16 if bf16 else Precision.FP32,
    )
    rows = []
    for kind, pairs in pairs_by_kind.items():
        clip = create(model, seed=1)
        reference = Reference(clip, settings, shards, given)
        if isinstance(pairs, Ready):
            reference.use([(clip.normalise(b.images_BCHW), b.tokens_BL) for b in pairs.batches])
        turns = Turns(given.device, reference.epoch)
        found = make_set(tested, classes=list(CLASSES), plan=PLAN, evaluation=evaluation, seed=3)
        watched = Watched(pairs)
        with loader_timed(watched.loader):
            Training(clip, watched, settings, turns, found).run()
        ours, theirs = statistics.median(turns.ours), statistics.median(turns.theirs)
        ratios = [one / other for one, other in zip(turns.ours, turns.theirs, strict=True)]
        row = {"model": model, "batch": given.batch, "source": kind, "raybd": ours, "open_clip_train": theirs}
        row |= {"ratio": statistics.median(ratios), "rounds": [turns.ours, turns.theirs], "decoding_once": decoding}
        for name, waits in (("waiting", watched.seconds), ("loader", watched.loader)):
            shares = (waited / whole for waited, whole in zip(waits[1:], turns.seconds, strict=True))
            row[name] = statistics.median(shares)  # without the first epoch, which warms up
        row["flops"] = training_flops(model, images=1) * ours
        rows.append(row)
        print(f"{model}, {kind}: {ours:.0f} against {theirs:.0f} images/s, {row['ratio']:.2f} x", file=sys.stderr)
    return rows


def ceiling(device: torch.device) -> float:
    """Return the operations a second of the best of ten large matrix products, in the precision of the runs."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)


def table(rows: Sequence[dict[str, Any]], peak: float) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| model | batch | batches from | raybd, images/s | open_clip_train, images/s | ratio | of ceiling "
        "| waiting | of it for the loader |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = f"{row['raybd']:.0f} | {row['open_clip_train']:.0f} | {row['ratio']:.2f}"
        head = f"| {row['model']} | {row['batch']} | {row['source']}"
        lines.append(f"{head} | {speeds} | {row['flops'] / peak:.0%} | {row['waiting']:.1%} | {row['loader']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", help="resnet-tiny-32 and vit-tiny-32 where none is given")
    parser.add_argument("--data", help="root of shards; such are made where none is given")
    parser.add_argument("--samples", type=int, default=8192, help="pairs of an epoch")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of either side that has them")
    parser.add_argument("--source", action="append", choices=("cached", "streamed", "ready"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    given = parser.parse_args()
    given.source = given.source or ["cached", "streamed", "ready"]
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as given.folder:
        for model in given.model or ["resnet-tiny-32", "vit-tiny-32"]:
            size = create(model, seed=0).image_size
            root = given.data or f"{given.folder}/shards-{size}"
            if not os.path.exists(root):
                write_shards(Path(root), count=given.samples, size=size)
            rows += compare(given, model, root)
        peak = ceiling(given.device)
    threads = f"{torch.get_num_threads()} threads, no GPU used"
    name = torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else threads
    where = setting("torch", "open_clip_torch", "webdataset", device=name)
    print(table(rows, peak))
    print(f"\nceiling: {peak / 1e12:.3g} Tflop/s, the best of ten large matrix products")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    record = {"setting": where, "ceiling": peak, "samples": given.samples, "workers": given.workers, "rows": rows}
    given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

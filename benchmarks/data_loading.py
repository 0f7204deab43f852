"""How fast do shards become decoded batches? raybd's reader beside plain PIL and beside webdataset's own pipeline.

    python benchmarks/data_loading.py --root SHARDS/cifar10

One process with one thread reads the same shards in every way, in turns: images a second here are images a second and
core. Plain PIL has the files' bytes in memory already and does nothing but decode them, so it is the ceiling of all
that decode with it. `from the cache` is what trials read: images that raybd has decoded before, mapped into memory.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from setting import setting
from torchvision.transforms import v2

from raybd.data import cache, shards
from raybd.data.shards import RawSample
from raybd.study_file import load

_BATCH = 128


def _batches(images: Iterator[np.ndarray | torch.Tensor]) -> int:
    """Stack images into batches of uint8 [B, 3, S, S] and return how many images there were."""
    count = 0
    while some := list(itertools.islice(images, _BATCH)):
        count += len(torch.stack([torch.as_tensor(image) for image in some]))
    return count


def _fit(size: int) -> v2.Compose:
    return v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])


def with_raybd(urls: Sequence[str], size: int) -> int:
    """Read and decode with what fills the cache and streams."""
    return _batches(shards.decode(sample.image, size) for url in urls for sample in shards.samples(url))


def with_pil(samples: Sequence[RawSample], size: int) -> int:
    """Decode bytes that are in memory."""
    fit = _fit(size)
    return _batches(fit(Image.open(io.BytesIO(sample.image)).convert("RGB")) for sample in samples)


def with_webdataset(urls: Sequence[str], size: int) -> int:
    """Read, decode and batch with webdataset's pipeline, captions and labels as they are."""
    suffixes = "jpg;jpeg;png;webp"
    found = wds.WebDataset(list(urls), shardshuffle=False, empty_check=False).decode("pil").to_tuple(suffixes, "txt")
    loader = found.map_tuple(_fit(size), lambda text: text).batched(_BATCH, partial=True)
    return sum(len(images) for images, _ in loader)


def from_cache(images: cache.Images) -> int:
    """Take batches out of the decoded cache, in a random order as training does."""
    order = np.random.default_rng(0).permutation(len(images.index))
    return sum(len(images.pixels(order[start : start + _BATCH])) for start in range(0, len(order), _BATCH))


def measure(ways: Mapping[str, Callable[[], int]], *, rounds: int) -> dict[str, list[float]]:
    """Return images a second of each way in each round; a first round warms up. Errors: SystemExit."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        counts = {}
        for name, way in ways.items():
            started = time.perf_counter()
            counts[name] = way()
            if number:
                found[name].append(counts[name] / (time.perf_counter() - started))
        if len(set(counts.values())) != 1:
            raise SystemExit(f"not the same images: {counts}")
    return found


def table(rates: Mapping[str, Sequence[float]]) -> str:
    """Return a Markdown table of medians, and of ratios within rounds."""
    others = ("plain PIL, bytes in memory", "webdataset")
    lines = ["| way | images a second and core | × plain PIL | × webdataset |", "|---|---|---|---|"]
    for name, own in rates.items():
        ratios = [median(a / b for a, b in zip(own, rates[other], strict=True)) for other in others]
        lines.append(f"| {name} | {median(own):,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", default="cifar10")
    parser.add_argument("--root", help="folder of the study's shards")
    parser.add_argument("--size", type=int, default=32, help="side of the images that come out, pixels")
    parser.add_argument("--shards", type=int, default=1, help="how many of the training shards are read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    given = _given()
    torch.set_num_threads(1)
    data = load(given.study, overrides=[f"data.root={given.root}"] if given.root else []).data
    urls = shards.find_shards(data, data.train, field_name="data.train")[: given.shards]
    raw = [sample for url in urls for sample in shards.samples(url)]
    with tempfile.TemporaryDirectory() as folder:
        cached = cache.load_images(urls, size=given.size, cache_dir=folder)
        ways: dict[str, Callable[[], int]] = {
            "raybd, from shards": lambda: with_raybd(urls, given.size),
            "plain PIL, bytes in memory": lambda: with_pil(raw, given.size),
            "webdataset": lambda: with_webdataset(urls, given.size),
            "raybd, from the cache": lambda: from_cache(cached),
        }
        rates = measure(ways, rounds=given.rounds)
    shape = f"{len(raw)} images of {sum(os.path.getsize(url) for url in urls) / 1e6:.1f} MB to {given.size} pixels"
    print(f"{shape}, batches of {_BATCH}; medians of {given.rounds} rounds\n")
    print(table(rates))
    where = setting("torch", "torchvision", "pillow", "webdataset")
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    record: dict[str, Any] = {"setting": where, "size": given.size, "images": len(raw), "images_a_second": rates}
    given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

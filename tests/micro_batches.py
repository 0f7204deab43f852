"""Single steps of a small model in float64, in micro batches or in one go; for one process and for ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from raybd.data.pairs import Batch
from raybd.model import Clip, create
from raybd.study import LossWeights, Precision, TrainSettings
from raybd.train.distributed import active
from raybd.train.loop import Training
from raybd.train.recipe import Recipe

VIT, RESNET = "vit-tiny-32", "resnet-tiny-32"
WORDS = ["red", "green", "small", "large", "old", "new", "cat", "dog", "tree", "ship", "car", "bird"]
# Each with all that a step may have to carry: views, a bias, a tower that is not trained.
WEIGHTS: dict[str, dict[str, float]] = {
    "mmcl": {"mmcl": 1.0},
    "mmcl_ssl": {"mmcl": 1.0, "ssl": 2.0},
    "nt_xent": {"mmcl": 0.0, "nt_xent": 1.0},
    "siglip": {"mmcl": 0.0, "siglip": 1.0},
    "text_ssl": {"mmcl": 0.0, "text_ssl": 1.0},
}


class Double(Clip):
    """A model of float64 pixels."""

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """Return float64."""
        return super().normalise(image_BCHW).double()


def run_of(loss: str, micro: int | None, *, model: str = VIT, recipe: Recipe | None = None) -> Training:
    """Return a run that can take steps, on the ranks there are."""
    made = create(model, seed=1, sigmoid=loss == "siglip")
    settings = TrainSettings(
        epochs=1,
        batch_size=16,
        micro_batch_size=micro,
        lr=1e-3,
        warmup_steps=0,
        loss_weights=LossWeights(**WEIGHTS[loss]),
        precision=Precision.FP32,
    )
    here: Any = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1)
    pairs: Any = range(16)
    nothing: Any = None
    run = Training(Double(**{**vars(made), "net": made.net.double()}), pairs, settings, here, nothing, recipe=recipe)
    run.recipe.set_mode(run)
    if active():
        run.net = DistributedDataParallel(run.clip.net)
    return run


def batch(run: Training, count: int, some: slice = slice(None)) -> Batch:
    """Return some of `count` pairs with their views, the same ones each time."""
    draw = torch.Generator().manual_seed(7)
    images, views = torch.randint(0, 256, (2, count, 3, 32, 32), generator=draw, dtype=torch.uint8)
    texts = [" ".join(WORDS[i] for i in torch.randint(0, 12, (5,), generator=draw)) for _ in range(2 * count)]
    tokens = run.clip.tokenize(texts)
    keys = tuple(str(number) for number in range(count))
    return Batch(images[some], tokens[:count][some], views[some], tokens[count:][some], 0, keys=keys[some])


def stepped(run: Training, given: Batch) -> dict[str, Tensor]:
    """Take a step; return its loss, its gradients, and the buffers afterwards."""
    loss = run.recipe.step(run, given)
    gradients = {name: p.grad.clone() for name, p in run.clip.net.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in run.clip.net.named_buffers()}
    return {"loss": loss.total.detach(), **gradients, **buffers}

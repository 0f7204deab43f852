"""What training and evaluation cost, in operations: multiply-adds of the towers, two operations each.

Counted on models without storage. Elementwise work, losses, optimizers and clustering are left out: some percent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from raybd.data.pairs import steps
from raybd.model import create_on_meta, forward_flops, image_size, training_flops
from raybd.study import TrainSettings


@dataclass(frozen=True)
class Towers:
    """Operations of a model for one image with its caption, and its size.

    Attributes:
        pair_forward, pair_training: both towers, forward alone, and forward and backward.
        image_forward, image_training: the image tower.
        image_attack: forward, and backward to the image alone: one step of an adversary.
        weight_bytes: parameters and buffers in float32.
        has_batchnorm: whether the image tower has BatchNorm.
    """

    pair_forward: float
    pair_training: float
    image_forward: float
    image_training: float
    image_attack: float
    weight_bytes: int
    has_batchnorm: bool

    @property
    def text_forward(self) -> float:
        """The text tower, forward."""
        return self.pair_forward - self.image_forward


@cache
def towers(name: str) -> Towers:
    """Return what a model costs. Errors: StudyError on an unknown name."""
    pair_forward, pair_training = forward_flops(name), training_flops(name)
    net = create_on_meta(name)
    size = image_size(name)
    image_BCHW = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        rows_BD = net.encode_image(image_BCHW)
        forward = counter.get_total_flops()
        rows_BD.sum().backward()
        training = counter.get_total_flops()
    net.requires_grad_(requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        net.encode_image(image_BCHW.requires_grad_()).sum().backward()
        attack = counter.get_total_flops()
    tensors = [*net.parameters(), *net.buffers()]
    return Towers(
        pair_forward=pair_forward,
        pair_training=pair_training,
        image_forward=float(forward),
        image_training=float(training),
        image_attack=float(attack),
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        has_batchnorm=any(isinstance(part, _BatchNorm) for part in net.visual.modules()),
    )


def training_cost(model: str, settings: TrainSettings, *, pairs: int, workers: int = 1) -> float:
    """Return the operations of a whole training run on so many pairs; views double it.

    Args:
        workers: that share each batch.
    """
    cost = towers(model)
    twice = cost.pair_forward if in_micro_batches(settings, pairs=pairs, workers=workers) else 0.0
    return settings.epochs * pairs * views(settings) * (cost.pair_training + twice)


def evaluation_cost(model: str, *, images: int, passes: int, prompts: int) -> float:
    """Return the operations of one evaluation.

    Args:
        passes: how often each image is looked at: clean, and with each trigger.
        prompts: texts that the class embeddings are made of.
    """
    cost = towers(model)
    return images * passes * cost.image_forward + prompts * cost.text_forward


def in_micro_batches(settings: TrainSettings, *, pairs: int, workers: int = 1) -> bool:
    """Say whether steps encode each pair once more, without a graph: where a worker's part exceeds a micro batch."""
    largest = -(-pairs // steps(pairs, settings.batch_size)) if pairs else 0
    return settings.micro_batch_size is not None and settings.micro_batch_size < -(-largest // workers)


def views(settings: TrainSettings) -> int:
    """Return how often a step encodes each pair: itself, and augmented where a loss looks at that."""
    return 2 if settings.loss_weights.views else 1

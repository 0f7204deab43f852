"""How fast this machine's device is on a model: a few timed steps on random pixels."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from raybd.costs import towers
from raybd.model import create
from raybd.objectives import mmcl
from raybd.study import Pretrain
from raybd.train.loop import make_optimizer

_STEPS, _SECONDS = 5, 20.0


@dataclass(frozen=True)
class Speed:
    """What a device sustains, in operations a second, and how that is known.

    Attributes:
        training: over optimizer steps.
        forward: over forward passes of the image tower, as evaluations take them.
    """

    training: float
    forward: float
    how: str


def measure(model: str, *, use_gpu: bool) -> Speed:
    """Time training steps and forward passes of a model, weights and pixels at random. Errors: StudyError.

    Reading, decoding and augmenting data are no part of it.

    Args:
        use_gpu: on the GPU rather than the CPU.
    """
    device = torch.device("cuda" if use_gpu else "cpu")
    clip, cost = create(model, seed=0), towers(model)
    net = clip.net.to(device, memory_format=torch.channels_last).train()
    batch = 64 if use_gpu or clip.image_size <= 64 else 4
    images = torch.randint(0, 256, (batch, 3, clip.image_size, clip.image_size), dtype=torch.uint8, device=device)
    tokens = clip.tokenize(["a photo of a banana"] * batch).to(device)
    optimizer = make_optimizer(net, Pretrain())

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_gpu):
            image_rows, text_rows, logit_scale, *_ = net(clip.normalise(images), tokens)
        optimizer.zero_grad(set_to_none=True)
        mmcl(image_rows.float(), text_rows.float(), logit_scale.float()).backward()
        optimizer.step()

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_gpu):
            net.encode_image(clip.normalise(images))

    training = _seconds(step, use_gpu=use_gpu)
    net.eval()
    looking = _seconds(forward, use_gpu=use_gpu)
    what = torch.cuda.get_device_name(device) if use_gpu else f"cpu, {torch.get_num_threads()} threads"
    return Speed(
        training=batch * cost.pair_training / training,
        forward=batch * cost.image_forward / looking,
        how=f"measured on {what}, batches of {batch}, {'bf16' if use_gpu else 'fp32'}",
    )


def _seconds(step: object, *, use_gpu: bool) -> float:
    """Return the median time of a step, after one that is not counted; fewer steps where they are slow."""
    assert callable(step)
    step()
    times: list[float] = []
    while len(times) < _STEPS and sum(times) < _SECONDS:
        if use_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if use_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]

"""ABD: CleanCLIP with adversarial images in place of augmented ones.

B batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from raybd.clean.draws import uniform
from raybd.costs import Towers
from raybd.data.pairs import Batch
from raybd.objectives import Loss, mmcl
from raybd.seeding import fork
from raybd.study import CleanSettings
from raybd.study.methods import Abd
from raybd.train.loop import Training
from raybd.train.recipe import Recipe


def pgd(
    images_BCHW: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    seeds: Sequence[int],
) -> Tensor:
    """Return images that raise `loss`, each pixel within `epsilon` of the original and in [0, 1].

    Projected gradient ascent in the ℓ∞ ball, from a random point of it that depends on the image's own seed.
    Gradients are taken for the images alone: those of parameters are left as they are.

    Args:
        images_BCHW: float32 in [0, 1].
        loss: of images like these, a number.
        seeds: one for each image.

    Source: arXiv 1706.06083.
    """
    low, high = (images_BCHW - epsilon).clamp(0, 1), (images_BCHW + epsilon).clamp(0, 1)
    start = epsilon * (2 * uniform(seeds, *images_BCHW.shape[1:], device=images_BCHW.device) - 1)
    found_BCHW = (images_BCHW + start).clamp(low, high)
    for _ in range(steps):
        found_BCHW.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(found_BCHW), found_BCHW)
        found_BCHW = (found_BCHW.detach() + step_size * gradient.sign()).clamp(low, high)
    return found_BCHW.detach()


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, gradients as they are, and every part of it back into the mode that it was in."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass
class AdversarialViews(Recipe):
    """ABD: the image's view is the adversary's, the caption's is EDA; losses and weights are CleanCLIP's.

    The adversary raises the contrastive loss of the batch's images against its captions, the model being as it is
    at this step and in eval mode: BatchNorm's statistics are neither used up nor touched by the attack. Views have
    fractions of a grey level. A step costs `steps` more passes through the image tower than CleanCLIP's.

    Source: arXiv 2409.15968. Differs: no code of it is published; its adversary attacks the poisoned model and its
    loss has a term of its own, here the model attacked is the one in training and the loss is CleanCLIP's.
    """

    in_parts = False
    settings: Abd
    seed: int

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.abd, seed)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Add the adversary's steps, which need the captions' embeddings, where a loss looks at views."""
        attack = cost.text_forward + self.settings.steps * cost.image_attack if views == 2 else 0.0
        return views * cost.pair_training + attack, 0.0

    def loss(self, run: Training, batch: Batch) -> Loss:
        """Return CleanCLIP's loss with adversarial image views."""
        if batch.token_views_BL is None:
            return run.loss(batch)  # no SSL term, so nobody looks at views
        batch = replace(batch, images_BCHW=batch.images_BCHW.to(run.context.device, non_blocking=True))
        return run.loss(replace(batch, image_views_BCHW=255 * self.views(run, batch)))

    def views(self, run: Training, batch: Batch) -> Tensor:
        """Return a batch's adversarial images, float32 in [0, 1], on the run's device."""
        device, net = run.context.device, run.clip.net
        images_BCHW = batch.images_BCHW.to(device).float() / 255
        seeds = [fork(self.seed, "start", run.epoch, key) for key in batch.keys]
        with in_eval_mode(net):
            with torch.no_grad(), run.autocast():
                text_BD = net.encode_text(batch.tokens_BL.to(device), normalize=True).float()
                logit_scale = net.logit_scale.exp().float()

            def contrastive(found_BCHW: Tensor) -> Tensor:
                pixels = run.clip.normalise(255 * found_BCHW).contiguous(memory_format=torch.channels_last)
                with run.autocast():
                    image_BD = net.encode_image(pixels, normalize=True).float()
                return mmcl(image_BD, text_BD, logit_scale)

            return pgd(
                images_BCHW,
                contrastive,
                epsilon=self.settings.epsilon,
                steps=self.settings.steps,
                step_size=self.settings.step_size,
                seeds=seeds,
            )

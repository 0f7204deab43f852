"""Training objectives: losses of feature rows, pure functions.

N global batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


def identity(rows: Tensor) -> Tensor:
    """Return the rows themselves: the gather of a single process."""
    return rows


def mmcl(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Multimodal contrastive loss (CLIP): cross-entropy of each image against all texts, and the other way, halved.

    ½ [CE(s X Tᵀ) + CE(s T Xᵀ)] against arange(N), with s = `logit_scale`.

    Args:
        image_ND, text_ND: L2-normalised rows; row i of one belongs to row i of the other.
        logit_scale: the scale itself, not its logarithm.

    Source: arXiv 2103.00020; vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss.
    """
    logits_NN = logit_scale * image_ND @ text_ND.T
    target_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2


def ssl(image_ND: Tensor, image_view_ND: Tensor, text_ND: Tensor, text_view_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Self-supervised loss within each modality, halved: each original against all augmented rows.

    ½ [CE(s X X~ᵀ) + CE(s T T~ᵀ)]. One direction only and cross-view negatives only: it is not SimCLR's NT-Xent.

    Args:
        image_ND, image_view_ND, text_ND, text_view_ND: L2-normalised rows of originals and augmented views.
        logit_scale: the scale itself, the same as for `mmcl`.

    Source: arXiv 2303.03323 (CleanCLIP); vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss.
    """
    target_N = torch.arange(len(image_ND), device=image_ND.device)
    image_loss = F.cross_entropy(logit_scale * image_ND @ image_view_ND.T, target_N)
    text_loss = F.cross_entropy(logit_scale * text_ND @ text_view_ND.T, target_N)
    return (image_loss + text_loss) / 2


@dataclass(frozen=True)
class Loss:
    """A loss and the unweighted terms that it is made of; a term of weight 0 is None."""

    total: Tensor
    mmcl: Tensor | None
    ssl: Tensor | None


def combined(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    image_view_BD: Tensor | None = None,
    text_view_BD: Tensor | None = None,
    mmcl_weight: float,
    ssl_weight: float,
    gather: Gather = identity,
) -> Loss:
    """Return w_mmcl L_MMCL + w_ssl L_SSL over the global batch.

    Args:
        image_BD, text_BD: this process's L2-normalised rows.
        image_view_BD, text_view_BD: rows of the augmented views; needed where `ssl_weight` > 0.
        gather: joins the rows of all processes, in one order for every tensor.

    Errors: ValueError where views are missing.
    """
    if ssl_weight and (image_view_BD is None or text_view_BD is None):
        raise ValueError("an SSL weight above 0 needs the augmented views of images and texts")
    image_ND, text_ND = gather(image_BD), gather(text_BD)
    mmcl_term = mmcl(image_ND, text_ND, logit_scale) if mmcl_weight else None
    ssl_term = None
    if ssl_weight and image_view_BD is not None and text_view_BD is not None:
        ssl_term = ssl(image_ND, gather(image_view_BD), text_ND, gather(text_view_BD), logit_scale)
    terms = [weight * term for weight, term in ((mmcl_weight, mmcl_term), (ssl_weight, ssl_term)) if term is not None]
    if not terms:
        raise ValueError("both weights are 0: nothing would be learnt")
    return Loss(total=torch.stack(terms).sum(), mmcl=mmcl_term, ssl=ssl_term)

"""Training objectives: losses of feature rows, pure functions.

N global batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def image_ssl(image_ND: Tensor, image_view_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Self-supervised loss of images: cross-entropy of each original against all augmented ones, CE(s X X~ᵀ).

    One direction only and cross-view negatives only: it is not SimCLR's NT-Xent.

    Args:
        image_ND, image_view_ND: L2-normalised rows of originals and augmented views.
        logit_scale: the scale itself, the same as for `mmcl`.

    Source: arXiv 2303.03323 (CleanCLIP); vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss.
    """
    target_N = torch.arange(len(image_ND), device=image_ND.device)
    return F.cross_entropy(logit_scale * image_ND @ image_view_ND.T, target_N)


def text_ssl(text_ND: Tensor, text_view_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Self-supervised loss of captions, CE(s T T~ᵀ): what `image_ssl` is for images."""
    return image_ssl(text_ND, text_view_ND, logit_scale)


def ssl(image_ND: Tensor, image_view_ND: Tensor, text_ND: Tensor, text_view_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Self-supervised loss within each modality: the mean of `image_ssl` and `text_ssl`."""
    return (image_ssl(image_ND, image_view_ND, logit_scale) + text_ssl(text_ND, text_view_ND, logit_scale)) / 2


def nt_xent(rows_ND: Tensor, views_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """SimCLR's loss of one modality: each of the 2N rows against its other view and the 2N-2 rows of other pairs.

    Mean over all 2N anchors of the cross-entropy, the anchor itself left out; temperature 1/s.

    Args:
        rows_ND, views_ND: L2-normalised rows of originals and augmented views, which play the same part.
        logit_scale: the scale itself.

    Source: arXiv 2002.05709, equation 1.
    """
    both_2ND = torch.cat([rows_ND, views_ND])
    pairs, count = len(rows_ND), len(both_2ND)
    itself = torch.eye(count, dtype=torch.bool, device=both_2ND.device)
    logits = (logit_scale * both_2ND @ both_2ND.T).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(count, device=both_2ND.device).roll(pairs))


def siglip(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sigmoid loss: each of the N² combinations of image and text is told apart as a pair or none by itself.

    −1/N Σ_ij log σ(z_ij (s x_i·t_j + b)), with z = 1 on the diagonal and −1 elsewhere.

    Args:
        image_ND, text_ND: L2-normalised rows; row i of one belongs to row i of the other.
        logit_scale: the scale itself.
        logit_bias: the bias b that is learnt with it.

    Source: arXiv 2303.15343, equation 1.
    """
    return _log_sigmoids(logit_scale * image_ND @ text_ND.T + logit_bias) / len(image_ND)


def siglip_mean(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Sigmoid loss as published with the attack: the mean over all N² combinations, without a bias.

    Source: vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss. It differs from `siglip` with b = 0 by 1/N.
    """
    return _log_sigmoids(logit_scale * image_ND @ text_ND.T) / len(image_ND) ** 2


def _log_sigmoids(logits_NN: Tensor) -> Tensor:
    """Return −Σ_ij log σ(z_ij logits_ij)."""
    sign_NN = 2 * torch.eye(len(logits_NN), dtype=logits_NN.dtype, device=logits_NN.device) - 1
    return -F.logsigmoid(sign_NN * logits_NN).sum()


@dataclass(frozen=True)
class Loss:
    """A loss and the unweighted terms that it is made of, by name; a term of weight 0 is not there."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Rows:
    """The rows of the global batch that terms are made from, gathered when first asked for."""

    own: Mapping[str, Tensor | None]
    gather: Gather
    found: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        rows_BD = self.own[name]
        if rows_BD is None:
            raise ValueError(f"a term with a weight above 0 needs {name}")
        if name not in self.found:
            self.found[name] = self.gather(rows_BD)
        return self.found[name]


_Term = Callable[[_Rows, Tensor, Tensor | None], Tensor]


def _biased(rows: _Rows, scale: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("siglip with a weight above 0 needs logit_bias")
    return siglip(rows["image"], rows["text"], scale, bias)


_TERMS: dict[str, _Term] = {
    "mmcl": lambda rows, scale, bias: mmcl(rows["image"], rows["text"], scale),
    "ssl": lambda rows, scale, bias: ssl(rows["image"], rows["image view"], rows["text"], rows["text view"], scale),
    "image_ssl": lambda rows, scale, bias: image_ssl(rows["image"], rows["image view"], scale),
    "text_ssl": lambda rows, scale, bias: text_ssl(rows["text"], rows["text view"], scale),
    "nt_xent": lambda rows, scale, bias: (
        (nt_xent(rows["image"], rows["image view"], scale) + nt_xent(rows["text"], rows["text view"], scale)) / 2
    ),
    "siglip": _biased,
    "siglip_mean": lambda rows, scale, bias: siglip_mean(rows["image"], rows["text"], scale),
}


def combined(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    image_view_BD: Tensor | None = None,
    text_view_BD: Tensor | None = None,
    logit_bias: Tensor | None = None,
    weights: Mapping[str, float],
    gather: Gather = identity,
) -> Loss:
    """Return the weighted sum of terms over the global batch.

    Args:
        image_BD, text_BD: this process's L2-normalised rows.
        image_view_BD, text_view_BD: rows of the augmented views, for the terms that compare with them.
        logit_bias: for `siglip`.
        weights: of the terms by name, as in `loss_weights`; those of weight 0 are not computed.
        gather: joins the rows of all processes, in one order for every tensor.

    Errors: ValueError where a term lacks what it is made from; KeyError on an unknown one.
    """
    own = {"image": image_BD, "text": text_BD, "image view": image_view_BD, "text view": text_view_BD}
    rows = _Rows(own, gather, {})
    terms = {name: _TERMS[name](rows, logit_scale, logit_bias) for name, weight in weights.items() if weight}
    if not terms:
        raise ValueError("all weights are 0: nothing would be learnt")
    return Loss(total=torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms=terms)

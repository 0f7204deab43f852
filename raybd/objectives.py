"""Training objectives: losses of feature rows, pure functions.

N global batch, B rows of this rank, D embedding width. Each rank of several compares its own rows with all of the
global batch and adds up with the others: nothing of N × N numbers is ever made, only B × N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """This rank's rows, and the rows of all ranks that they are compared with.

    Attributes:
        own_BD, all_ND: the own rows are `all_ND[start : start + B]`.
    """

    own_BD: Tensor
    all_ND: Tensor
    start: int

    @property
    def whole(self) -> bool:
        """Whether these are all rows, those of one process."""
        return self.own_BD is self.all_ND


class Ranks(Protocol):
    """The processes that share a batch: what a loss needs of them."""

    def gather(self, rows_BD: Tensor) -> Rows:
        """Join the rows of all, with gradients, in one order for every tensor."""

    def add(self, shares: Tensor) -> Tensor:
        """Return the sums over all of their shares, with gradients."""


class Alone:
    """One process: its rows are all there are."""

    def gather(self, rows_BD: Tensor) -> Rows:
        """Return the rows themselves."""
        return Rows(rows_BD, rows_BD, 0)

    def add(self, shares: Tensor) -> Tensor:
        """Return the shares themselves."""
        return shares


ALONE: Ranks = Alone()


def _rows(given: Tensor | Rows) -> Rows:
    return given if isinstance(given, Rows) else ALONE.gather(given)


def _cross_entropy(logits_BN: Tensor, start: int) -> Tensor:
    """Return this rank's share of the mean over N rows: row i belongs to column start + i."""
    count, total = logits_BN.shape
    target_B = torch.arange(start, start + count, device=logits_BN.device)
    return F.cross_entropy(logits_BN, target_B) * (count / total)


def mmcl(image: Tensor | Rows, text: Tensor | Rows, logit_scale: Tensor) -> Tensor:
    """Multimodal contrastive loss (CLIP): cross-entropy of each image against all texts, and the other way, halved.

    ½ [CE(s X Tᵀ) + CE(s T Xᵀ)] against arange(N), with s = `logit_scale`. Given this rank's rows among all, its share:
    the shares of all ranks add up to the loss. So it is for every loss here.

    Args:
        image, text: L2-normalised rows; row i of one belongs to row i of the other.
        logit_scale: the scale itself, not its logarithm.

    Source: arXiv 2103.00020; vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss.
    """
    image, text = _rows(image), _rows(text)
    logits_BN = logit_scale * image.own_BD @ text.all_ND.T
    back_BN = logits_BN.T if image.whole else logit_scale * text.own_BD @ image.all_ND.T
    return (_cross_entropy(logits_BN, image.start) + _cross_entropy(back_BN, text.start)) / 2


def image_ssl(image: Tensor | Rows, image_view: Tensor | Rows, logit_scale: Tensor) -> Tensor:
    """Self-supervised loss of images: cross-entropy of each original against all augmented ones, CE(s X X~ᵀ).

    One direction only and cross-view negatives only: it is not SimCLR's NT-Xent.

    Args:
        image, image_view: L2-normalised rows of originals and augmented views.
        logit_scale: the scale itself, the same as for `mmcl`.

    Source: arXiv 2303.03323 (CleanCLIP); vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss.
    """
    image, image_view = _rows(image), _rows(image_view)
    return _cross_entropy(logit_scale * image.own_BD @ image_view.all_ND.T, image.start)


def text_ssl(text: Tensor | Rows, text_view: Tensor | Rows, logit_scale: Tensor) -> Tensor:
    """Self-supervised loss of captions, CE(s T T~ᵀ): what `image_ssl` is for images."""
    return image_ssl(text, text_view, logit_scale)


def ssl(
    image: Tensor | Rows,
    image_view: Tensor | Rows,
    text: Tensor | Rows,
    text_view: Tensor | Rows,
    logit_scale: Tensor,
) -> Tensor:
    """Self-supervised loss within each modality: the mean of `image_ssl` and `text_ssl`."""
    return (image_ssl(image, image_view, logit_scale) + text_ssl(text, text_view, logit_scale)) / 2


def nt_xent(rows: Tensor | Rows, views: Tensor | Rows, logit_scale: Tensor) -> Tensor:
    """SimCLR's loss of one modality: each of the 2N rows against its other view and the 2N-2 rows of other pairs.

    Mean over all 2N anchors of the cross-entropy, the anchor itself left out; temperature 1/s.

    Args:
        rows, views: L2-normalised rows of originals and augmented views, which play the same part.
        logit_scale: the scale itself.

    Source: arXiv 2002.05709, equation 1.
    """
    rows, views = _rows(rows), _rows(views)
    own_AD = torch.cat([rows.own_BD, views.own_BD])
    all_MD = own_AD if rows.whole else torch.cat([rows.all_ND, views.all_ND])
    pairs, anchors = len(rows.all_ND), len(own_AD)
    place_B = torch.arange(rows.start, rows.start + len(rows.own_BD), device=own_AD.device)
    itself_A, other_A = torch.cat([place_B, place_B + pairs]), torch.cat([place_B + pairs, place_B])
    itself_AM = itself_A[:, None] == torch.arange(2 * pairs, device=own_AD.device)
    logits_AM = (logit_scale * own_AD @ all_MD.T).masked_fill(itself_AM, -torch.inf)
    return F.cross_entropy(logits_AM, other_A) * (anchors / (2 * pairs))


def siglip(image: Tensor | Rows, text: Tensor | Rows, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sigmoid loss: each of the N² combinations of image and text is told apart as a pair or none by itself.

    −1/N Σ_ij log σ(z_ij (s x_i·t_j + b)), with z = 1 on the diagonal and −1 elsewhere.

    Args:
        image, text: L2-normalised rows; row i of one belongs to row i of the other.
        logit_scale: the scale itself.
        logit_bias: the bias b that is learnt with it.

    Source: arXiv 2303.15343, equation 1.
    """
    image, text = _rows(image), _rows(text)
    logits_BN = logit_scale * image.own_BD @ text.all_ND.T + logit_bias
    return _log_sigmoids(logits_BN, image.start) / len(image.all_ND)


def siglip_mean(image: Tensor | Rows, text: Tensor | Rows, logit_scale: Tensor) -> Tensor:
    """Sigmoid loss as published with the attack: the mean over all N² combinations, without a bias.

    Source: vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss. It differs from `siglip` with b = 0 by 1/N.
    """
    image, text = _rows(image), _rows(text)
    return _log_sigmoids(logit_scale * image.own_BD @ text.all_ND.T, image.start) / len(image.all_ND) ** 2


def _log_sigmoids(logits_BN: Tensor, start: int) -> Tensor:
    """Return −Σ_ij log σ(z_ij logits_ij), z = 1 where j = start + i."""
    sign_BN = torch.full_like(logits_BN, -1.0)
    sign_BN.diagonal(start).fill_(1.0)
    return -F.logsigmoid(sign_BN * logits_BN).sum()


@dataclass(frozen=True)
class Loss:
    """A loss and the unweighted terms that it is made of, by name; a term of weight 0 is not there."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Gathered:
    """The rows that terms are made from, gathered when first asked for."""

    own: Mapping[str, Tensor | None]
    ranks: Ranks
    found: dict[str, Rows]

    def __getitem__(self, name: str) -> Rows:
        rows_BD = self.own[name]
        if rows_BD is None:
            raise ValueError(f"a term with a weight above 0 needs {name}")
        if name not in self.found:
            self.found[name] = self.ranks.gather(rows_BD)
        return self.found[name]


_Term = Callable[[_Gathered, Tensor, Tensor | None], Tensor]


def _biased(rows: _Gathered, scale: Tensor, bias: Tensor | None) -> Tensor:
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
    ranks: Ranks = ALONE,
) -> Loss:
    """Return the weighted sum of terms over the global batch.

    Args:
        image_BD, text_BD: this process's L2-normalised rows.
        image_view_BD, text_view_BD: rows of the augmented views, for the terms that compare with them.
        logit_bias: for `siglip`.
        weights: of the terms by name, as in `loss_weights`; those of weight 0 are not computed.
        ranks: the processes that share the batch; each gets the same loss.

    Errors: ValueError where a term lacks what it is made from; KeyError on an unknown one.
    """
    own = {"image": image_BD, "text": text_BD, "image view": image_view_BD, "text view": text_view_BD}
    rows = _Gathered(own, ranks, {})
    shares = {name: _TERMS[name](rows, logit_scale, logit_bias) for name, weight in weights.items() if weight}
    if not shares:
        raise ValueError("all weights are 0: nothing would be learnt")
    terms = dict(zip(shares, ranks.add(torch.stack(list(shares.values()))).unbind(), strict=True))
    return Loss(total=torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms=terms)

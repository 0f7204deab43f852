"""CleanCLIP and its halves: finetuning with the weighted sum of the contrastive and the self-supervised loss."""

from __future__ import annotations

from raybd.train.recipe import Recipe


class CleanClip(Recipe):
    """Plain finetuning with a new optimizer. Weights (1, 1) are CleanCLIP, (1, 0) MMCL only, (0, 1) SSL only.

    Source: arXiv 2303.03323; nishadsinghi/CleanCLIP@d6e2f1d src/train.py.
    Differs: the published code takes over the pretraining optimizer's state and with it its weight decay.
    """

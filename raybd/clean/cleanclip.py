"""CleanCLIP and its halves: finetuning with the weighted sum of the contrastive and the self-supervised loss."""

from __future__ import annotations

from raybd.data.pairs import Pairs
from raybd.evaluate import EvaluationSet
from raybd.model import Clip
from raybd.study import CleanSettings
from raybd.train.context import TrainContext
from raybd.train.loop import Training


def cleanclip(
    clip: Clip, pairs: Pairs, settings: CleanSettings, context: TrainContext, evaluation_set: EvaluationSet
) -> float:
    """Finetune a poisoned model in place; return the weight decay that the optimizer had in force.

    Weights (1, 1) are CleanCLIP, (1, 0) is MMCL only, (0, 1) SSL only. The optimizer is new.

    Source: arXiv 2303.03323; nishadsinghi/CleanCLIP@d6e2f1d src/train.py.
    Differs: the published code takes over the pretraining optimizer's state and with it its weight decay.
    """
    training = Training(clip, pairs, settings, context, evaluation_set)
    training.run()
    return training.weight_decay_in_force()

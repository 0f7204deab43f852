"""What a cleaning method may change of a training run, as hooks of the loop. The one here changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from raybd.costs import Towers
from raybd.data.pairs import Batch
from raybd.objectives import Loss
from raybd.study import CleanSettings, Study
from raybd.train import grad_cache

if TYPE_CHECKING:
    from raybd.train.loop import Training


class Recipe:
    """Plain training on the weighted sum of losses: pretraining, and the base of every cleaning method.

    A method overrides the hooks that it needs. They are called in this order, each with the run:
    `attach`, [epoch 0 is recorded], `start`, then for each epoch `begin_epoch`, `set_mode` and `step` for each batch,
    after the last epoch `points`, and at the end, or after an error, `detach`. What a hook draws at random must
    depend on the seed and its place in the run alone, and nothing but the model and the optimizer may be carried over
    from one epoch to the next: a run goes on from an epoch's end after its process died.
    """

    optimizes = True  # whether `step` takes optimizer steps: without any, no learning rate and no decay are in force
    in_parts = True  # whether steps heed `micro_batch_size`: they are `step`'s, and `loss` is the run's own

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial with these settings.

        Args:
            seed: of all that the method draws.
        """
        return cls()

    def check(self, study: Study) -> None:
        """Refuse a study that the method cannot be carried out in, before any work: by its model, or what is lacking.

        Errors: StudyError, CheckpointError.
        """

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Return the operations for each cleaning pair: of an epoch, and of what is done once in a run.

        Args:
            views: 2 where the losses look at augmented views, else 1.
        """
        return views * cost.pair_training, 0.0

    def attach(self, run: Training) -> None:
        """Look at the model as it came: copy it, choose what is trained. Called at a fresh start and on resuming.

        The optimizer is made afterwards, from the parameters that require gradients.
        """

    def start(self, run: Training) -> None:
        """Change the weights once, after the model as it came was recorded as epoch 0.

        Called on resuming only where no later epoch was finished: the state kept is that of the model as it came.
        """

    def begin_epoch(self, run: Training, epoch: int) -> None:
        """Prepare an epoch, from 1."""

    def set_mode(self, run: Training) -> None:
        """Put the model into the mode that it is trained in."""
        run.clip.net.train()

    def loss(self, run: Training, batch: Batch) -> Loss:
        """Return the loss of a batch, ready for `backward`."""
        return run.loss(batch)

    def step(self, run: Training, batch: Batch) -> Loss:
        """Take one optimizer step and return the loss that it was taken on."""
        loss = self._backward(run, batch)
        run.optimizer.step()
        return loss

    def _backward(self, run: Training, batch: Batch) -> Loss:
        size = run.settings.micro_batch_size
        if self.in_parts and size is not None and size < len(batch.images_BCHW):
            return grad_cache.backward(run, batch, size=size)
        loss = self.loss(run, batch)
        run.guard(loss)
        run.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        return loss

    alphas: tuple[float, ...] = ()  # of all points that `points` yields

    def points(self, run: Training, *, first: int = 0) -> Iterator[float]:
        """Set weights without training, one candidate after the other; yield each one's `alpha`. None here.

        Args:
            first: how many of them were recorded before: they are left out.
        """
        return iter(())

    def detach(self, run: Training) -> None:
        """Take back what `attach` changed of the model besides its weights."""

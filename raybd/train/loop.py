"""The training loop, for pretraining and cleaning alike: epochs of steps, each followed by an evaluation.

B this rank's part of a batch, N the global batch, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raybd import checkpoint
from raybd.data.pairs import Batch, Pairs, steps
from raybd.errors import CheckpointError, DataError
from raybd.evaluate import EvaluationSet, measure
from raybd.model import Clip, freeze_unused
from raybd.objectives import Loss, combined
from raybd.study import Precision, TrainSettings
from raybd.train.context import Progress, TrainContext
from raybd.train.distributed import active, ranks, share_buffers, sum_over_ranks
from raybd.train.guard import Guard, numbers
from raybd.train.recipe import Recipe
from raybd.train.schedule import learning_rate

_MAX_LOG_SCALE = 4.605170185988092  # ln 100
# Steps after which losses are fetched. Doing so waits for the device: the fewer times, the less it stands idle.
_FETCH_STEPS = 50


def make_optimizer(net: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW as published: no weight decay on gains, biases, norms and the logit scale.

    Those are the parameters with fewer than two dimensions.
    """
    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim >= 2]
    free = [p for p in net.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def _full(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True)
class Features:
    """What the model makes of a batch: normalised rows of originals and views, logit scale and bias."""

    image_BD: Tensor
    text_BD: Tensor
    logit_scale: Tensor
    image_view_BD: Tensor | None
    text_view_BD: Tensor | None
    logit_bias: Tensor | None


@dataclass
class _EpochSums:
    """Running sums over one epoch, of this rank.

    Attributes:
        losses: of total and terms, by their columns' names.
        waiting: those of steps that are still on the device.
    """

    steps: int = 0
    samples: int = 0
    poisoned: int = 0
    broken: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    waiting: list[dict[str, Tensor]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)


class Training:
    """One run: a model, its optimizer and its place in the schedule.

    Args:
        clip: the model; it is trained in place.
        pairs: where the batches come from.
        settings: of this run.
        context: where it runs and reports to.
        evaluation_set: evaluated before the first epoch and after each.
        max_broken: share of broken samples in an epoch above which the run stops.
        recipe: what a cleaning method changes of plain training.
        halt: asked after each epoch whether the run ends there, before its last one.
        start_counts: what an evaluation of this model as it comes gave before; filled in where it is empty.
    """

    def __init__(
        self,
        clip: Clip,
        pairs: Pairs,
        settings: TrainSettings,
        context: TrainContext,
        evaluation_set: EvaluationSet,
        *,
        max_broken: float = 1.0,
        recipe: Recipe | None = None,
        halt: Callable[[int], bool] = lambda epoch: False,
        start_counts: dict[str, Any] | None = None,
    ) -> None:
        self.clip, self.pairs, self.settings, self.context = clip, pairs, settings, context
        self.evaluation_set, self.max_broken = evaluation_set, max_broken
        self.recipe, self._halt = recipe or Recipe(), halt
        self._start_counts = {} if start_counts is None else start_counts
        weights = settings.loss_weights
        freeze_unused(clip.net, image=weights.uses_images, text=weights.uses_texts, bias=weights.siglip > 0)
        clip.net.to(context.device, memory_format=torch.channels_last)
        self.recipe.attach(self)
        self.optimizer = make_optimizer(clip.net, settings)
        self._names = {parameter: name for name, parameter in clip.net.named_parameters()}
        self._steps_an_epoch = steps(len(pairs), settings.batch_size)
        self._guard = Guard(self.optimizer, context.device)
        self.net: nn.Module = clip.net
        self.epoch = self.step = self.samples_seen = self.poisoned_seen = 0

    def run(self) -> None:
        """Train to the last epoch or where it is halted, from the start or from where the context says it was left.

        Errors: NonFiniteError where the loss is not finite; DataError where too many samples are broken.
        """
        try:
            self._run()
        finally:
            self.recipe.detach(self)

    def _run(self) -> None:
        device = self.context.device
        found = self.context.last_epoch() if self.context.rank == 0 else 0
        reported = int(sum_over_ranks([found], device=device)[0])
        if reported >= self.settings.epochs + len(self.recipe.alphas):
            return
        done = self._restore(reported)
        if done is None:
            self.clip.net.train()
            self._finish_epoch(0, None, time.perf_counter())
            done = 0
        if done == 0:
            self.recipe.start(self)
        if active():
            ids = [device.index] if device.type == "cuda" else None
            self.net = DistributedDataParallel(self.clip.net, device_ids=ids)
        for epoch in range(done + 1, self.settings.epochs + 1):
            if self._halt(epoch - 1):
                return
            sums = self._train_epoch(epoch)
            self._finish_epoch(epoch, sums, time.perf_counter())
        first = max(0, reported - self.settings.epochs)
        for number, alpha in enumerate(self.recipe.points(self, first=first), start=self.settings.epochs + 1 + first):
            self._finish_epoch(number, None, time.perf_counter(), alpha=alpha)

    def weight_decay_in_force(self) -> float | None:
        """Return the weight decay that the optimizer applies, read back from it; None where it takes no step."""
        return float(self.optimizer.param_groups[0]["weight_decay"]) if self.recipe.optimizes else None

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass: bf16 where the settings ask for it."""
        kind = self.context.device.type
        wanted = self.settings.precision
        bf16 = wanted is Precision.BF16 or (wanted is Precision.AUTO and kind == "cuda")
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16)

    def _train_epoch(self, epoch: int) -> _EpochSums:
        context, sums, self.epoch = self.context, _EpochSums(), epoch
        self.recipe.begin_epoch(self, epoch)
        self.recipe.set_mode(self)
        batches = self.pairs.epoch(
            epoch,
            batch_size=self.settings.batch_size,
            rank=context.rank,
            world_size=context.world_size,
            device=context.device,
            last=self.settings.epochs,
        )
        try:
            for batch in batches:
                self._take_step(sums, batch)
                if sums.steps % _FETCH_STEPS == 0:
                    self._fetch(sums)
                self._note_progress(epoch, sums)
        finally:
            self._fetch(sums)  # also after another error: a loss that was not finite came before it
        return sums

    def _take_step(self, sums: _EpochSums, batch: Batch) -> None:
        """Train on a batch, without waiting for the device."""
        self._set_lr()
        loss = self.recipe.step(self, batch)
        self.clamp_scale()
        self.step += 1
        sums.steps += 1
        sums.samples += len(batch.images_BCHW)
        sums.poisoned += batch.poisoned
        sums.broken += batch.broken
        sums.waiting.append({"loss": loss.total.detach(), **{f"loss_{n}": t.detach() for n, t in loss.terms.items()}})

    def clamp_scale(self) -> None:
        """Keep the logit scale within [1, 100]."""
        with torch.no_grad():
            self.clip.net.logit_scale.clamp_(0.0, _MAX_LOG_SCALE)

    def guard(self, loss: Loss) -> None:
        """Have an optimizer step on a loss that is not finite change nothing, nor any step after it.

        The device sees to that itself, without being waited for. NonFiniteError comes when losses are fetched: after
        some steps, and before the epoch is recorded.
        """
        self._guard.watch(self.step, loss.total.detach())

    def check_guarded(self) -> None:
        """Wait for the losses guarded so far. Errors: NonFiniteError that names the first that is not finite."""
        self._guard.check(epoch=self.epoch, lr=self._lr)

    def _fetch(self, sums: _EpochSums) -> None:
        """Wait for the losses of the steps so far and add them up, one after the other. Errors: NonFiniteError."""
        self.check_guarded()
        waiting, sums.waiting = sums.waiting, []
        names = [name for losses in waiting for name in losses]
        for name, number in zip(names, numbers([loss for losses in waiting for loss in losses.values()]), strict=True):
            sums.losses[name] = sums.losses.get(name, 0.0) + number

    def _lr(self, step: int) -> float:
        return learning_rate(
            self.settings.schedule,
            step,
            base_lr=self.settings.lr,
            warmup_steps=self.settings.warmup_steps,
            total_steps=self._steps_an_epoch * self.settings.epochs,
        )

    def _set_lr(self) -> None:
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def encode(self, pixels_BCHW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised image rows, text rows and the logit scale, float32 at least, with gradients.

        Args:
            pixels_BCHW: normalised images (`Clip.normalise`), on any device.
            tokens_BL: tokens, on any device.
        """
        device = self.context.device
        pixels = pixels_BCHW.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            image_rows, text_rows, logit_scale, *_ = self.net(pixels, tokens_BL.to(device, non_blocking=True))
        return _full(image_rows), _full(text_rows), _full(logit_scale)

    def features(self, batch: Batch) -> Features:
        """Return the rows of a batch; originals and views go through the model as one batch."""
        images, tokens, views = batch.images_BCHW, batch.tokens_BL, batch.image_views_BCHW is not None
        if batch.image_views_BCHW is not None and batch.token_views_BL is not None:
            images, tokens = torch.cat([images, batch.image_views_BCHW]), torch.cat([tokens, batch.token_views_BL])
        pixels = self.clip.normalise(images.to(self.context.device, non_blocking=True))
        image_rows, text_rows, logit_scale = self.encode(pixels, tokens)
        own = len(batch.images_BCHW)
        return Features(
            image_rows[:own],
            text_rows[:own],
            logit_scale,
            image_rows[own:] if views else None,
            text_rows[own:] if views else None,
            self.clip.net.logit_bias,
        )

    def loss(self, batch: Batch) -> Loss:
        """Return the loss of the global batch."""
        return self.loss_of(self.features(batch))

    def loss_of(self, found: Features) -> Loss:
        """Return the loss of the global batch, given this rank's rows."""
        return combined(
            found.image_BD,
            found.text_BD,
            found.logit_scale,
            image_view_BD=found.image_view_BD,
            text_view_BD=found.text_view_BD,
            logit_bias=found.logit_bias,
            weights=vars(self.settings.loss_weights),
            ranks=ranks(),
        )

    def _note_progress(self, epoch: int, sums: _EpochSums) -> None:
        seconds = time.perf_counter() - sums.started
        left = self._steps_an_epoch * self.settings.epochs - self.step
        self.context.progress(
            Progress(
                epoch=epoch,
                epochs=self.settings.epochs,
                step=sums.steps,
                steps=self._steps_an_epoch,
                samples_per_second=sums.samples * self.context.world_size / seconds,
                seconds_left=left * seconds / sums.steps,
            )
        )

    def _finish_epoch(self, epoch: int, sums: _EpochSums | None, trained: float, *, alpha: float | None = None) -> None:
        """Evaluate, report, and keep the state to go on from."""
        record = {**self._training_columns(epoch, sums, trained), "alpha": alpha}
        needed = epoch < self.settings.epochs + (1 if self.recipe.alphas else 0)
        state = (lambda: self._state(epoch, record)) if needed else None
        self.context.report(epoch, record, lambda: self._weights(epoch), state)

    def _weights(self, epoch: int) -> bytes:
        return checkpoint.to_bytes(self.clip.net.state_dict(), {"epoch": epoch, "model": self.clip.name})

    def _training_columns(self, epoch: int, sums: _EpochSums | None, trained: float) -> dict[str, Any]:
        """Add up over the ranks, evaluate, and return the epoch's record: training columns, and counts of each half."""
        context, device = self.context, self.context.device
        columns: dict[str, Any] = {"loss": None, "lr": None, "broken": 0}
        seconds = 0.0
        if sums is not None:
            samples, poisoned, broken = (
                int(n) for n in sum_over_ranks([sums.samples, sums.poisoned, sums.broken], device=device)
            )
            self.samples_seen += samples
            self.poisoned_seen += poisoned
            seconds = trained - sums.started
            if broken > self.max_broken * (samples + broken):
                raise DataError(
                    f"{broken} of {samples + broken} samples of epoch {epoch} could not be decoded",
                    expected=f"at most {self.max_broken:.2%} (data.max_broken)",
                    fix="mend the shards or raise data.max_broken",
                )
            columns |= {
                **{name: total / sums.steps for name, total in sums.losses.items()},
                "lr": float(self.optimizer.param_groups[0]["lr"]) if self.recipe.optimizes else None,
                "broken": broken,
            }
        counted = (epoch == 0 and dict(self._start_counts)) or self._evaluate()
        if epoch == 0:
            self._start_counts.update(counted)
        evaluated = time.perf_counter() - trained
        return {
            **columns,
            "epoch": epoch,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "poisoned_seen": self.poisoned_seen,
            "logit_scale": float(self.clip.net.logit_scale.detach().exp()),
            "train_seconds": seconds,
            "evaluate_seconds": evaluated,
            "samples_per_second": samples / seconds if sums is not None else None,
            **counted,
            "world_size": context.world_size,
        }

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate on all ranks; return the record's counts."""
        context = self.context
        share_buffers(self.clip.net)
        own = measure(
            self.clip,
            self.evaluation_set,
            device=context.device,
            rank=context.rank,
            world_size=context.world_size,
            autocast=self.autocast,
            gather=lambda rows: ranks().gather(rows).all_ND,
        )
        added = own.holding(sum_over_ranks(own.numbers(), device=context.device))
        return added.records(self.evaluation_set)

    def _state(self, epoch: int, record: dict[str, Any]) -> bytes:
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.clip.net.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self._names)
        place = {"epoch": epoch, "step": self.step, "samples": self.samples_seen, "poisoned": self.poisoned_seen}
        return checkpoint.to_bytes(tensors, {**place, "record": record})

    def _restore(self, reported: int) -> int | None:
        """Go back to the state that the context kept; return its epoch, None at a fresh start.

        Its epoch is reported where that did not come about before the process died.
        """
        content = self.context.load_state()
        if content is None:
            return None
        tensors = checkpoint.from_bytes(content, where="state")
        place = checkpoint.metadata_of(content)
        if missing := {"epoch", "step", "samples", "poisoned", "record"} - place.keys():
            raise CheckpointError(
                f"state of another version of raybd: it lacks {', '.join(sorted(missing))}",
                where="state",
                fix="go on with the version that wrote it, or in a new --run-dir",
            )
        weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        try:
            self.clip.net.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"state of another model: {error}", where="state") from None
        checkpoint.restore_optimizer(self.optimizer, tensors, self._names)
        self.step, self.samples_seen = place["step"], place["samples"]
        self.poisoned_seen = place["poisoned"]
        epoch = int(place["epoch"])
        if epoch > reported:
            self.context.report(epoch, place["record"], lambda: self._weights(epoch))
        return epoch

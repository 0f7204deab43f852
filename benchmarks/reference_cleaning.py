"""One cleaning epoch with its evaluation, in two ways that raybd is measured against. Run by `cleaning_epoch.py`.

`Published` does it as the published code does: images decoded and augmented one by one with PIL in the workers of a
DataLoader, the full N×N loss, the prompts of one class encoded at a time, clean and triggered images in two passes.
`Floor` takes the same steps and the same forwards on tensors that are already there: no way of feeding the model can
be faster. Both are plain on purpose, and share no code with raybd but the model, the trigger and the word swaps.

Written from arXiv 2311.14948, arXiv 2303.03323 and the behaviour of vsahil/attack-cleanclip@3d4bd74; no code is theirs.
B images of a batch, N images with their views, P prompts, D embedding width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from raybd.data.views import text_view
from raybd.model import Clip
from raybd.poison.plan import Attack
from raybd.seeding import fork
from raybd.study import CleanSettings, TextView


@dataclass(frozen=True)
class Encoded:
    """An image as its file has it, with what belongs to it: a caption to train on, or a label to be told by."""

    key: str
    image: bytes
    caption: str
    label: int


@dataclass(frozen=True)
class Task:
    """What is done in every way: the same settings, classes, prompts and trigger.

    Attributes:
        prompts: of each class, its texts.
        seed: of the triggers, which are then raybd's.
        batch: images in one forward pass of the evaluation.
        total_steps: of the whole schedule.
    """

    settings: CleanSettings
    prompts: Sequence[Sequence[str]]
    attack: Attack
    target: int
    seed: int
    batch: int
    total_steps: int
    device: torch.device
    autocast: Callable[[], torch.autocast]


@dataclass
class Found:
    """Counts of an evaluation."""

    n_clean: int = 0
    correct_clean: int = 0
    n_triggered: int = 0
    hit_target: int = 0


def cleanclip_loss(image_ND: Tensor, text_ND: Tensor, scale: Tensor, settings: CleanSettings) -> Tensor:
    """Return w_mmcl L_MMCL + w_ssl L_SSL of rows whose second half are the views of the first, in full N×N products."""
    half = len(image_ND) // 2
    image_BD, text_BD = image_ND[:half], text_ND[:half]
    target_B = torch.arange(half, device=image_ND.device)
    across = scale * image_BD @ text_BD.T
    mmcl = (F.cross_entropy(across, target_B) + F.cross_entropy(scale * text_BD @ image_BD.T, target_B)) / 2
    of_images, of_texts = scale * image_BD @ image_ND[half:].T, scale * text_BD @ text_ND[half:].T
    ssl = (F.cross_entropy(of_images, target_B) + F.cross_entropy(of_texts, target_B)) / 2
    return settings.loss_weights.mmcl * mmcl + settings.loss_weights.ssl * ssl


def adamw(clip: Clip, settings: CleanSettings, *, fused: bool | None) -> torch.optim.AdamW:
    """Return AdamW without decay on what has fewer than two dimensions; `fused=None` is torch's own choice."""
    decayed = [p for p in clip.net.parameters() if p.ndim >= 2]
    free = [p for p in clip.net.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=fused)


class _Way:
    """The steps, which are the same in every way."""

    def __init__(self, clip: Clip, task: Task, *, fused: bool | None) -> None:
        self.clip, self.task = clip, task
        self.optimizer = adamw(clip, task.settings, fused=fused)
        self.step = 0

    def _take_step(self, pixels_NCHW: Tensor, tokens_NL: Tensor) -> Tensor:
        settings, net = self.task.settings, self.clip.net
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        with self.task.autocast():
            image_rows, text_rows, scale, *_ = net(pixels_NCHW, tokens_NL)
        loss = cleanclip_loss(image_rows.float(), text_rows.float(), scale.float(), settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            net.logit_scale.clamp_(0.0, math.log(100))
        self.step += 1
        return loss.detach()

    def _lr(self) -> float:
        """Linear warm-up, then half a cosine."""
        settings, warm = self.task.settings, self.task.settings.warmup_steps
        if self.step < warm:
            return settings.lr * (self.step + 1) / warm
        left = max(1, self.task.total_steps - warm)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (self.step - warm) / left)))

    def _losses(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Train on batches and return the mean loss."""
        self.clip.net.train()
        losses = [self._take_step(pixels, tokens) for pixels, tokens in batches]
        return float(torch.stack(losses).mean())

    @torch.inference_mode()
    def _predict(self, pixels_BCHW: Tensor, classes_CD: Tensor) -> Tensor:
        with self.task.autocast():
            rows_BD = self.clip.net.encode_image(pixels_BCHW, normalize=True)
        return (rows_BD.float() @ classes_CD.T).argmax(dim=-1)


class _Loaded(Dataset[Any]):
    """What the loader's workers do with one image."""

    def __init__(self, images: Sequence[Encoded], clip: Clip) -> None:
        self.images = images
        self.fit = v2.Compose(
            [v2.Resize(clip.image_size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(clip.image_size)]
        )
        self.normalise = v2.Normalize(clip.mean, clip.std)

    def __len__(self) -> int:
        return len(self.images)

    def open(self, i: int) -> Image.Image:
        return Image.open(io.BytesIO(self.images[i].image)).convert("RGB")

    def ready(self, picture: Image.Image) -> Tensor:
        return self.normalise(v2.functional.to_dtype(v2.functional.pil_to_tensor(picture), torch.float32, scale=True))


class _Training(_Loaded):
    """Pairs with their views: AutoAugment on the picture as it is in its file; tokens are looked up."""

    def __init__(self, images: Sequence[Encoded], clip: Clip, task: Task, *, eda_each_epoch: bool) -> None:
        super().__init__(images, clip)
        self.augment = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
        self.tokenizer, self.seed, self.eda_each_epoch = clip.tokenizer, task.seed, eda_each_epoch
        self.tokens = clip.tokenizer([image.caption for image in images])
        self.token_views = clip.tokenizer([self._swapped(i) for i in range(len(images))])

    def _swapped(self, i: int, *labels: int) -> str:
        seed = fork(self.seed, "eda", self.images[i].key, *labels)
        return text_view(self.images[i].caption, TextView.EDA, seed=seed)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        picture = self.open(i)
        view = self.ready(self.fit(self.augment(picture)))
        token_view = self.token_views[i]
        if self.eda_each_epoch:
            token_view = self.tokenizer([self._swapped(i, int(torch.randint(1 << 31, ())))])[0]
        return self.ready(self.fit(picture)), view, self.tokens[i], token_view


class _Testing(_Loaded):
    """Labelled images, all of them clean, or all of other classes than the target with the trigger."""

    def __init__(self, images: Sequence[Encoded], clip: Clip, task: Task, *, triggered: bool) -> None:
        super().__init__([i for i in images if not triggered or i.label != task.target], clip)
        self.attack = task.attack if triggered else None
        self.seed = task.seed

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, own = self.fit(self.open(i)), self.images[i]
        if self.attack is not None:
            pixels = self.attack.triggered(
                v2.functional.pil_to_tensor(picture), seed=fork(self.seed, "evaluate", own.key)
            )
            picture = v2.functional.to_pil_image(pixels)
        return self.ready(picture), own.label


class Published(_Way):
    """A cleaning epoch and its evaluation as the published code carries them out.

    Args:
        clip: trained in place; contiguous layout, AdamW as torch chooses it.
        workers: processes of each DataLoader, started anew for each pass, as there.
        eda_each_epoch: draw and tokenise the captions' views anew; as published they are drawn once and kept.
    """

    name = "published way"

    def __init__(
        self,
        clip: Clip,
        task: Task,
        pairs: Sequence[Encoded],
        tests: Sequence[Encoded],
        *,
        workers: int,
        eda_each_epoch: bool = False,
    ) -> None:
        clip.net.to(task.device, memory_format=torch.contiguous_format)
        super().__init__(clip, task, fused=None)
        pinned = {"num_workers": workers, "pin_memory": task.device.type == "cuda"}
        training = _Training(pairs, clip, task, eda_each_epoch=eda_each_epoch)
        # Every batch as large as raybd cuts them: the same number of steps, and no remainder.
        count = -(-len(pairs) // task.settings.batch_size)
        self._train = DataLoader(training, shuffle=True, batch_size=-(-len(pairs) // count), **pinned)
        self._clean, self._triggered = (
            DataLoader(_Testing(tests, clip, task, triggered=triggered), batch_size=task.batch, **pinned)
            for triggered in (False, True)
        )

    def train(self) -> float:
        """Train one epoch; return its mean loss."""
        return self._losses(self._batches())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.task.device
        for images, views, tokens, token_views in self._train:
            pixels, both = torch.cat([images, views]), torch.cat([tokens, token_views])
            yield pixels.to(device, non_blocking=True), both.to(device, non_blocking=True)

    def evaluate(self) -> Found:
        """Evaluate clean images, then triggered ones."""
        self.clip.net.eval()
        classes_CD = self._classes()
        n_clean, correct = self._pass(self._clean, classes_CD)
        n_triggered, hit = self._pass(self._triggered, classes_CD, target=self.task.target)
        return Found(n_clean, correct, n_triggered, hit)

    @torch.inference_mode()
    def _classes(self) -> Tensor:
        """Return class embeddings [C, D]: the prompts of a class are tokenised and encoded together, class by class."""
        rows = []
        for texts in self.task.prompts:
            tokens_PL = self.clip.tokenizer(list(texts)).to(self.task.device)
            with self.task.autocast():
                of_class = self.clip.net.encode_text(tokens_PL, normalize=True).float().mean(dim=0)
            rows.append(of_class / of_class.norm())
        return torch.stack(rows)

    def _pass(self, loader: DataLoader[Any], classes_CD: Tensor, *, target: int | None = None) -> tuple[int, int]:
        count = hits = 0
        for pixels_BCHW, labels_B in loader:
            predicted = self._predict(pixels_BCHW.to(self.task.device, non_blocking=True), classes_CD).cpu()
            hits += int((predicted == (labels_B if target is None else target)).sum())
            count += len(labels_B)
        return count, hits


@dataclass(frozen=True)
class Ready:
    """All that an epoch and its evaluation are made from, on the device, normalised.

    Attributes:
        batches: (pixels [N, 3, H, W], tokens [N, L]) of originals and, after them, their views.
        clean_MCHW, triggered_KCHW, labels_M: the evaluation.
        prompts_PL: tokens, class by class.
    """

    batches: Sequence[tuple[Tensor, Tensor]]
    clean_MCHW: Tensor
    triggered_KCHW: Tensor
    labels_M: Tensor
    prompts_PL: Tensor


class Floor(_Way):
    """The same steps and forwards on what is ready: the least that an epoch with its evaluation can take.

    Args:
        layout: memory format of the model and the images.
        fused: AdamW's.
        compiled: both towers by `torch.compile`, which happens in their first passes.
    """

    name = "floor"

    def __init__(
        self,
        clip: Clip,
        task: Task,
        ready: Ready,
        *,
        layout: torch.memory_format = torch.channels_last,
        fused: bool | None = True,
        compiled: bool = False,
    ) -> None:
        clip.net.to(task.device, memory_format=layout)
        if compiled:
            for tower in (clip.net.visual, getattr(clip.net, "text", None) or clip.net.transformer):
                tower.compile()
        super().__init__(clip, task, fused=fused)
        self._ready, self._layout = ready, layout
        # The layout costs nothing where it is the one that the images have.
        self._batches = [(pixels.contiguous(memory_format=layout), tokens) for pixels, tokens in ready.batches]
        self._clean = ready.clean_MCHW.contiguous(memory_format=layout)
        self._triggered = ready.triggered_KCHW.contiguous(memory_format=layout)

    def train(self) -> float:
        """Train one epoch; return its mean loss."""
        return self._losses(self._batches)

    @torch.inference_mode()
    def evaluate(self) -> Found:
        """Evaluate clean and triggered images."""
        ready, batch = self._ready, self.task.batch
        self.clip.net.eval()
        with self.task.autocast():
            parts = [self.clip.net.encode_text(part, normalize=True).float() for part in ready.prompts_PL.split(1024)]
        mean_CD = torch.cat(parts).view(len(self.task.prompts), -1, parts[0].shape[-1]).mean(dim=1)
        classes_CD = F.normalize(mean_CD, dim=-1)
        predicted = torch.cat([self._predict(part, classes_CD) for part in self._clean.split(batch)])
        misled = torch.cat([self._predict(part, classes_CD) for part in self._triggered.split(batch)])
        correct, hit = int((predicted == ready.labels_M).sum()), int((misled == self.task.target).sum())
        return Found(len(predicted), correct, len(misled), hit)


def encoded(samples: Iterable[Any], keys: Sequence[str]) -> list[Encoded]:
    """Return the samples of these keys, in the order of `keys`."""
    wanted = set(keys)
    found = {s.key: Encoded(s.key, s.image, s.caption, s.label) for s in samples if s.key in wanted}
    return [found[key] for key in keys]


def numbers(found: Found) -> np.ndarray:
    """Return counts as an array, to be compared."""
    return np.array([found.n_clean, found.correct_clean, found.n_triggered, found.hit_target])

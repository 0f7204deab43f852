"""Models: open_clip's by name, and small ones for 32-pixel images registered beside them."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import raybd.resnet_tiny  # noqa: F401 - timm knows its trunk from here on
from raybd import checkpoint
from raybd.errors import CheckpointError, StudyError

_CONFIGS = Path(__file__).parent / "model_configs"
# Where the sigmoid loss starts: arXiv 2303.15343, section 3.2.
SIGMOID_LOG_SCALE, SIGMOID_BIAS = math.log(10), -10.0


@cache
def register() -> None:
    """Make raybd's small models known to open_clip; calling it again does nothing."""
    open_clip.add_model_config(_CONFIGS)


def names() -> list[str]:
    """Return every model name that a study may give."""
    register()
    return sorted(open_clip.list_models())


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what belongs to it.

    Attributes:
        net: the module; `net(images_BCHW, tokens_BL)` gives normalised features and the logit scale.
        image_size: side of the square image it takes, pixels.
        mean, std: of the normalisation, in units of [0, 1].
    """

    name: str
    net: nn.Module
    tokenizer: Any
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return tokens of texts, int64 [N, L]; texts too long are cut as open_clip cuts them."""
        return self.tokenizer(texts)

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """Return uint8 images as normalised float32, on their device."""
        mean = torch.tensor(self.mean, device=image_BCHW.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=image_BCHW.device).view(1, -1, 1, 1)
        return (image_BCHW.float() / 255 - mean) / std


def check_name(name: str, *, where: str = "model.name") -> None:
    """Raise StudyError unless `name` is a model of two towers with a logit scale."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3)
        fix = f"did you mean {', '.join(close)}?" if close else ""
        raise StudyError(f"no model of the name {name!r}", where=where, fix=fix)
    config = open_clip.get_model_config(name)
    if "multimodal_cfg" in config:
        raise StudyError(f"{name} is a captioning model, not a CLIP model with a logit scale", where=where)


def image_size(name: str) -> int:
    """Return the side of the square image that a model takes, in pixels, without building it. Errors: StudyError."""
    check_name(name)
    size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def create_on_meta(name: str) -> nn.Module:
    """Build a model without storage, to count what it has and does. Errors: StudyError on an unknown name."""
    check_name(name)
    with torch.device("meta"), _quiet():
        return open_clip.create_model(name, pretrained=None, pretrained_text=False, output_dict=False, device="meta")


@cache
def _flops(name: str) -> tuple[int, int]:
    """Return the operations of one image and its caption: of the forward pass, and of forward and backward pass.

    Counted on a model without storage: matrix products, convolutions and attention, two operations for each
    multiply-add. Elementwise work, the loss, the optimizer and what fused attention computes again are left out.
    """
    net = create_on_meta(name)
    size, length = image_size(name), open_clip.get_model_config(name)["text_cfg"].get("context_length", 77)
    with FlopCounterMode(display=False) as counter:
        image_rows, text_rows, *_ = net(
            torch.zeros(1, 3, size, size, device="meta"), torch.zeros(1, length, dtype=torch.long, device="meta")
        )
        forward = counter.get_total_flops()
        (image_rows.sum() + text_rows.sum()).backward()
    return forward, counter.get_total_flops()


def forward_flops(name: str, *, images: int = 1) -> float:
    """Return the floating-point operations of encoding so many images and captions. Errors: StudyError."""
    check_name(name)
    return float(_flops(name)[0] * images)


def training_flops(name: str, *, images: int = 1) -> float:
    """Return the operations of a forward and a backward pass of so many images and captions. Errors: StudyError.

    A pair with augmented views counts as two.
    """
    check_name(name)
    return float(_flops(name)[1] * images)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from warning, through the root logger, that weights are random: here they are meant to be."""
    root = logging.getLogger()
    root.addFilter(_not_random_weights)
    try:
        yield
    finally:
        root.removeFilter(_not_random_weights)


def _not_random_weights(record: logging.LogRecord) -> bool:
    return "initialized randomly" not in record.getMessage()


def create(name: str, *, seed: int, sigmoid: bool = False) -> Clip:
    """Build a model with random weights drawn from `seed`.

    It normalises images as the model's published weights want them, where those agree; else as CLIP does.

    Args:
        sigmoid: start with the scale and the bias of the sigmoid loss, not with the scale of the contrastive one.

    Errors: StudyError on an unknown name, or one whose tokenizer cannot be had.
    """
    check_name(name)
    start = {"init_logit_scale": SIGMOID_LOG_SCALE, "init_logit_bias": SIGMOID_BIAS} if sigmoid else {}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        net = open_clip.create_model(name, pretrained=None, pretrained_text=False, output_dict=False, **start)
    return _described(name, net)


def pretrained(name: str, weights: str, *, field: str) -> Clip:
    """Build a model with weights that someone else trained.

    Args:
        weights: path of a file (`checkpoint.read`), or a tag that open_clip has weights under, which it downloads.
        field: of the study, what errors name; its `model` is `name`, its `checkpoint` is `weights`.

    Errors: StudyError where there are no such weights; CheckpointError where they cannot be read or had.
    """
    check_name(name, where=f"{field}.model")
    if Path(weights).is_file():
        clip = create(name, seed=0)
        load_weights(clip, checkpoint.read(weights), where=weights)
        return clip
    clip = create(name, seed=0)
    load_tag(clip, weights, where=f"{field}.checkpoint")
    return clip


def tag_file(name: str, tag: str, *, where: str) -> str:
    """Return the path of weights that open_clip knows under a tag, downloaded where they are not here yet.

    Errors: StudyError where there are none for this model as it is built here; CheckpointError where they cannot be
    had.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise StudyError(
            f"open_clip has no weights of that tag for {name}: {tag!r}",
            where=where,
            expected=f"a file, or one of {', '.join(tags)}" if tags else "a file: open_clip has none of this model",
        )
    found = open_clip.get_pretrained_cfg(name, tag)
    if found.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        fix = f"set the model to {name}-quickgelu"
        raise StudyError(f"{tag} was trained with another activation than {name} has", where=where, fix=fix)
    if _normalisation(name) is None and tuple(found["mean"]) != open_clip.OPENAI_DATASET_MEAN:
        raise StudyError(f"{tag} was trained on images normalised in another way than {name}'s", where=where)
    try:
        path = open_clip.download_pretrained(found)
    except Exception as error:  # whatever a download may fail with
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"open_clip's weights {tag} of {name} cannot be downloaded: {reason}",
            where=where,
            fix="download them where there is a network, and give the file (of a study's model: as model.start)",
        ) from None
    return str(path)


def load_tag(clip: Clip, tag: str, *, where: str) -> None:
    """Put weights that open_clip knows under a tag into a model. Errors: StudyError, CheckpointError."""
    path = tag_file(clip.name, tag, where=where)
    try:
        open_clip.load_checkpoint(clip.net, path, weights_only=True)
    except Exception as error:  # another model's weights, or a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"weights {tag} of {clip.name} cannot be read: {reason}", where=path) from None


def _described(name: str, net: nn.Module) -> Clip:
    """Return a model with what belongs to it."""
    found = open_clip.get_model_preprocess_cfg(net)
    size = found["size"]
    mean, std = _normalisation(name) or (tuple(found["mean"]), tuple(found["std"]))
    return Clip(
        name=name,
        net=net,
        tokenizer=_tokenizer(name),
        image_size=int(size[0] if isinstance(size, list | tuple) else size),
        mean=mean,
        std=std,
    )


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation that all published weights of a model share, None where they do not."""
    cfgs = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    found = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in cfgs}
    return found.pop() if len(found) == 1 else None


def check_whole(name: str) -> None:
    """Raise StudyError unless weights and configuration are all that open_clip needs of a model, in any place."""
    check_name(name)
    if of_others := {"hf_tokenizer_name", "hf_model_name"} & set(open_clip.get_model_config(name)["text_cfg"]):
        raise StudyError(
            f"{name} has parts from elsewhere ({', '.join(sorted(of_others))}): its weights are not all of it",
            where="model.name",
            expected="a model with open_clip's own tokenizer",
        )


def open_clip_config(clip: Clip) -> dict[str, Any]:
    """Return what open_clip builds a model and its preprocessing from, in a folder beside the weights; JSON-able.

    What is not in open_clip's list of models, or was added to one (a logit bias), is in it too.
    """
    model_cfg = open_clip.get_model_config(clip.name)
    if clip.net.logit_bias is not None:
        model_cfg["init_logit_bias"] = clip.net.logit_bias.item()
    # As `data.shards.decode` and `Clip.normalise` do it.
    preprocess = {"size": clip.image_size, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model_cfg, "preprocess_cfg": {**preprocess, "mean": list(clip.mean), "std": list(clip.std)}}


def check_folder(folder: str, clip: Clip) -> None:
    """Raise CheckpointError unless open_clip loads a folder as this model, every number and its preprocessing."""
    net = open_clip.create_model(f"local-dir:{folder}", output_dict=False)
    own, found = clip.net.state_dict(), net.state_dict()
    same = own.keys() == found.keys() and all(_same(own[name], found[name]) for name in own)
    again = _described(clip.name, net)
    if not same or (again.image_size, again.mean, again.std) != (clip.image_size, clip.mean, clip.std):
        raise CheckpointError("open_clip loads another model from it", where=folder)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@cache
def _tokenizer(name: str) -> Any:
    # Made once: it reads a vocabulary of 50,000 pieces, and nothing changes it.
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # a package or a file from the network, whatever it is that fails
        raise StudyError(
            f"the tokenizer of {name} cannot be loaded: {str(error).splitlines()[0]}",
            where="model.name",
            fix="it needs the package transformers, and the network once; other models have theirs built in",
        ) from None


def freeze_unused(net: nn.Module, *, image: bool, text: bool, bias: bool) -> None:
    """Freeze the towers, and the logit bias, that no loss term uses: DDP waits for the gradient of all that is not.

    Args:
        bias: whether it is to be learnt; a model without one gets it then.
    """
    if net.logit_bias is None and bias:
        net.logit_bias = nn.Parameter(torch.full_like(net.logit_scale.detach(), SIGMOID_BIAS))
    for name, parameter in net.named_parameters():
        if name == "logit_bias":
            parameter.requires_grad = bias
        elif name != "logit_scale" and not (image if name.startswith("visual.") else text):
            parameter.requires_grad = False


def load_weights(clip: Clip, weights: dict[str, Tensor], *, where: str) -> None:
    """Put weights into a model, all of them. Errors: CheckpointError that names what does not fit.

    The logit bias alone may be missing on either side: weights of a model that has one give it to this model, and
    a model keeps its own where the weights have none.
    """
    bias = weights.get("logit_bias")
    if clip.net.logit_bias is None and bias is not None and bias.numel() == 1:
        clip.net.logit_bias = nn.Parameter(torch.zeros(bias.shape))
    own = clip.net.state_dict()
    for name in ("logit_scale", "logit_bias"):
        # A number, or a vector of one: open_clip has written both.
        if name in own and name in weights and weights[name].numel() == 1:
            weights = {**weights, name: weights[name].reshape(own[name].shape)}
    if "logit_bias" in own:
        weights = {"logit_bias": own["logit_bias"], **weights}
    missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    found = (_misfit(name, weights[name], own[name]) for name in own if name in weights)
    wrong = [misfit for misfit in found if misfit]
    if missing or extra or wrong:
        faults = [
            *(f"{name} is missing" for name in missing[:3]),
            *wrong[:3],
            *(f"{name} is not known" for name in extra[:3]),
        ]
        raise CheckpointError(
            f"weights of another model: {'; '.join(faults)} "
            f"({len(missing)} missing, {len(wrong)} of another kind, {len(extra)} unknown)",
            where=where,
            expected=f"weights of {clip.name}",
            fix="set model.name to the model that the checkpoint holds",
        )
    clip.net.load_state_dict(weights)


def _misfit(name: str, given: Tensor, own: Tensor) -> str:
    """Say how a tensor is none that can take the place of the model's own; nothing where it can."""
    if given.shape != own.shape:
        return f"{name} is {tuple(given.shape)}, not {tuple(own.shape)}"
    if given.is_meta or given.is_quantized or given.layout is not torch.strided:
        return f"{name} holds no plain numbers"
    if given.is_floating_point() != own.is_floating_point() or given.is_complex():
        return f"{name} is {given.dtype}, not {own.dtype}"
    return ""

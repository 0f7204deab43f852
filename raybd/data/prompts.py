"""Prompt templates: texts with a place for a class name, by the name of a known set or as given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from raybd.data import limits
from raybd.errors import StudyError

Template = Callable[[str], str]
NAMES = ("openai_imagenet", "simple", "cifar", "caltech101")

_ARTICLES = ("a", "the")


def _cifar() -> list[str]:
    """18 texts: seven kinds of photo, and small and big, each with `a` and with `the`."""
    found = []
    for article in _ARTICLES:
        for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good "):
            found.append(f"a {kind}photo of {article} {{}}.")
        found += [f"a photo of {article} {size} {{}}." for size in ("small", "big")]
    return found


def _caltech101() -> list[str]:
    """34 texts: ten kinds of picture, six materials and a video game, each with `a` and with `the`."""
    kinds = (
        "a photo of",
        "a painting of",
        "plastic",
        "a sculpture of",
        "a sketch of",
        "a tattoo of",
        "toy",
        "a rendition of",
        "embroidered",
        "cartoon",
        "",
        "plushie",
        "origami",
        "art of",
        "graffiti of",
        "a drawing of",
        "a doodle of",
    )
    found = []
    for article in _ARTICLES:
        for kind in kinds:
            if not kind:
                found.append(f"{article} {{}} in a video game.")
            elif kind.endswith(" of"):
                found.append(f"{kind} {article} {{}}.")
            else:
                found.append(f"{article} {kind} {{}}.")
    return found


def _named(name: str) -> list[Template]:
    if name in ("openai_imagenet", "simple"):
        import open_clip

        return list(
            open_clip.OPENAI_IMAGENET_TEMPLATES if name == "openai_imagenet" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
    return [partial(text.replace, "{}") for text in (_cifar() if name == "cifar" else _caltech101())]


def templates(named: str | Sequence[str], *, field: str) -> list[Template]:
    """Return prompt templates: those of a known set, or the given texts, each with one `{}`.

    The sets: openai_imagenet (80) and simple (7), as open_clip has them; cifar (18, for CIFAR-10 and CIFAR-100) and
    caltech101 (34).

    Errors: StudyError.
    Source: openai/CLIP@a9b1bf5 data/prompts.md (cifar, caltech101).
    """
    if isinstance(named, str):
        if named not in NAMES:
            raise StudyError(f"no templates of the name {named!r}", where=field, expected=", ".join(NAMES))
        return _named(named)
    for text in named:
        if text.count("{}") != 1:
            raise StudyError(f"{text[:80]!r} must have exactly one {{}}", where=field, expected="a photo of a {}.")
        if len(text) > limits.MAX_CAPTION:
            raise StudyError(f"a template of {len(text)} characters", where=field, expected=f"{limits.MAX_CAPTION}")
    if not named:
        raise StudyError("no template given", where=field)
    return [partial(text.replace, "{}") for text in named]

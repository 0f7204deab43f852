"""Whether settings and methods agree: what is searched has an effect, and what a method needs is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from operator import attrgetter

from raybd.space import Range, Value
from raybd.study.cleaning import Clean, CleanSettings
from raybd.study.methods import OF_STEPS, TRAITS, Method, users


def methods(clean: Clean, space: Mapping[str, Range]) -> frozenset[Method]:
    """Return the methods that trials may have."""
    searched = space.get("method")
    if searched is None:
        return frozenset({clean.method})
    # Where `method` itself is conditional, trials without it have the study's own.
    return _named(searched.choices) | (frozenset({clean.method}) if searched.when else frozenset())


def _named(values: object) -> frozenset[Method]:
    given = values if isinstance(values, tuple) else (values,)
    return frozenset(Method(value) for value in given if value in list(Method))


def _drawn_for(name: str, space: Mapping[str, Range], possible: frozenset[Method]) -> frozenset[Method]:
    """Return the methods of the trials in which a searched setting is drawn, as its `when` and theirs say."""
    for other, wanted in space[name].when.items():
        if other == "method":
            possible &= _named(wanted)
        elif other in space:
            possible &= _drawn_for(other, space, possible)
    return possible


Fault = tuple[tuple[str, ...], str]


def faults(clean: Clean, space: Mapping[str, Range]) -> Iterator[Fault]:
    """Yield each setting, searched or given, that methods would ignore or cannot do without: where it is, a sentence.

    Without this a trial's record would show values that changed nothing, and a sampler would learn from them.
    """
    yield from _unmet(clean, space)
    possible = methods(clean, space)
    if all(any(values(clean, space, name)) for name in ("leaked_poison", "leaked_share")):
        yield _at("leaked_share", space), "a trial may have this or leaked_poison, set the other to 0"
    for name in space:
        idle = _drawn_for(name, space, possible) - users(name)
        if idle:
            effect = f"has no effect on {_list(idle)}, only on {_list(users(name))}"
            yield ("search", "space", name), f"{effect}: {_fix(possible & users(name))}"
    for section, field in CleanSettings.model_fields.items():
        given = getattr(clean, section)
        # What every training has may be given for a method without steps: nobody takes it for a difference.
        if section not in OF_STEPS and given != field.default and not possible & users(section):
            effect = f"has no effect on {_list(possible)}, only on {_list(users(section))}"
            yield ("clean", section), f"{effect}: remove it"


def _at(name: str, space: Mapping[str, Range]) -> tuple[str, ...]:
    """Return where a setting of cleaning is given."""
    return ("search", "space", name) if name in space else ("clean", *name.split("."))


def values(clean: Clean, space: Mapping[str, Range], name: str) -> list[Value]:
    """Return the smallest and the largest value that trials may have of a setting, or all that it may choose from."""
    found = space.get(name)
    own: list[Value] = [attrgetter(name)(clean)]
    if found is None:
        return own
    given = found.choices if found.choices is not None else (found.low, found.high)
    ends = [value for value in given if value is not None]
    return [*ends, *own] if found.when else ends


def cleaning_sets(clean: Clean, space: Mapping[str, Range]) -> list[CleanSettings]:
    """Return settings for each combination of sizes and leaks at the ends of what trials may have."""
    names = ("num_samples", "leaked_poison", "leaked_share")
    ends = [
        sorted({min(found, key=float), max(found, key=float)}) for found in (values(clean, space, n) for n in names)
    ]
    return [clean.settings(dict(zip(names, point, strict=True))) for point in product(*ends)]


def _unmet(clean: Clean, space: Mapping[str, Range]) -> Iterator[Fault]:
    possible = methods(clean, space)
    blind = frozenset(method for method in possible if TRAITS[method].learns_images)
    searched = any(name.startswith("loss_weights.") for name in space)
    if blind and not searched and not clean.loss_weights.uses_images:
        yield ("clean", "loss_weights"), f"{_list(blind)} would learn nothing: no weight is on a term that uses images"
    if Method.PSEUDO_LABELS in possible:
        for leaf in ("model", "checkpoint"):
            if not getattr(clean.pseudo_labels, leaf) and f"pseudo_labels.{leaf}" not in space:
                at = ("clean", "pseudo_labels", leaf)
                yield at, "missing: pseudo_labels needs another model to label the images"
    if Method.DEEP_CLUSTERING in possible:
        name = "deep_clustering.clusters"
        found = values(clean, space, name)
        if name in space and set(space[name].when) <= {"method"}:
            # Always drawn where it matters, so the study's own is never in force.
            found = [value for value in (*(space[name].choices or ()), space[name].high) if value is not None]
        most = max(found, key=float)
        pairs = min(values(clean, space, "num_samples"), key=float)
        if float(most) > float(pairs):
            yield _at(name, space), f"{most} clusters of {pairs} cleaning pairs"


def _fix(left: frozenset[Method]) -> str:
    return f"restrict it with `when: {{method: [{', '.join(sorted(left))}]}}`" if left else "remove it"


def _list(found: frozenset[Method]) -> str:
    return ", ".join(sorted(found))

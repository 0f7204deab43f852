"""Cluster files, which `ray up` takes: all mistakes at once, with their lines, before a machine is paid for.

Nothing is asked of a cloud, and no credentials are needed. What Ray would refuse is refused, and besides what Ray would
take and a study would fail on or wait for without end.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raybd import study_file
from raybd.cluster import credentials
from raybd.cluster.node_types import Machines, NodeType, custom, max_workers, metadata, node_types, prices, whole
from raybd.cluster.walk import walk
from raybd.errors import StudyError, dotted
from raybd.study import Study, mistakes
from raybd.study.mistakes import Place

if TYPE_CHECKING:
    from raybd.cluster.session import Share  # imports ray

# Keys that no study has, and every cluster file has some of.
_OWN_KEY = re.compile(
    r"^\{?\s*[\"']?(?:cluster_name|provider|available_node_types|head_node_type)[\"']?\s*:", re.MULTILINE
)
# Words in the files that come along, which stand for what everybody has to put in.
_TO_FILL_IN = {
    "BUCKET": "the name of your bucket",
    "AMI_ID": "the id of a machine image in your region",
    "PROJECT_ID": "your project's id",
    "IMAGE": "a boot image",
    "HEAD_ADDRESS": "the head's address",
    "WORKER_ADDRESS": "a worker's address",
    "USER_NAME": "who logs in by ssh",
}
_FILL_IN = re.compile(rf"(?<![$\w{{])({'|'.join(_TO_FILL_IN)})(?!\w)")
_MACHINE = {"aws": "InstanceType", "gcp": "machineType"}  # what a node_config cannot do without
_NO_TYPES = ("local", "kuberay", "readonly")  # providers whose machines are not described in the file
_BASH_SECONDS = 10.0  # on a machine that may be busy
_CONTEXT = ("cluster_name", "provider", "max_workers", "available_node_types", "head_node_type")


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a cluster file without a mistake.

    Attributes:
        lines: what there may be, and what a study takes of it.
        notes: what is no mistake, but should be known.
        machines: what there may be, for who counts with it.
        share: what a study takes of it, where one was given.
    """

    lines: tuple[str, ...]
    notes: tuple[str, ...]
    machines: Machines
    share: Share | None = None


def is_one(text: str) -> bool:
    """Return whether a YAML text, whole or broken, is a cluster file and no study."""
    return bool(_OWN_KEY.search(text))


def check(path: Path, study: Study | None = None, *, filled_in: bool = True) -> Verdict:
    """Check a cluster file. Errors: StudyError that lists every mistake, each with file and line.

    Args:
        filled_in: refuse words that wait to be replaced, such as BUCKET.
    """
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        raise StudyError("no such cluster file", where=str(path), fix="give the path of a file that `ray up` takes")
    return parse(study_file.read_text(path), source=str(path), study=study, filled_in=filled_in)


def parse(text: str, *, source: str, study: Study | None = None, filled_in: bool = True) -> Verdict:
    """Check a cluster file given as YAML text; `source` is what its errors call it. Errors: StudyError."""
    marks: dict[Place, str] = {}
    problems: list[tuple[str, str]] = []
    try:
        study_file.read_yaml(text, (), source, marks, problems)
        config = _as_ray_reads(text, source, problems[0][0] if problems else source)
    except StudyError as error:
        raise StudyError(credentials.hidden(error.what), where=error.where, expected=error.expected) from None
    secrets: dict[tuple[Place, str], str] = {}
    for place, kind, secret in credentials.found(config):
        secrets.setdefault((place, secret), kind)
    found = [(place, f"{kind} is written into the file: {_UNSAID}") for (place, _), kind in secrets.items()]
    found += _filled_in(config) if filled_in else ()
    verdict = Verdict((), (), Machines((), 0, {}))
    odd = list(_odd_keys(config))
    wrong, sound = (odd, False) if odd else _rules(config)
    found += wrong
    if sound:
        verdict = _with_study(config, study, found)
    problems += [(marks.get(mistakes.marked(place, marks), source), _sentence(place, what)) for place, what in found]
    if problems:
        hide = frozenset(secret for _, secret in secrets if len(secret) > 3)
        told = dict.fromkeys((where, credentials.hidden(what, hide)) for where, what in problems)
        shown = mistakes.listed([*told], of="cluster file")
        raise StudyError(shown, where=source, fix="correct them and call again")
    return verdict


_UNSAID = (
    "whoever sees the file has it, and so has every machine; take it out, make a new one, and let the environment, an "
    "instance profile or a file (file_mounts) give it"
)


def _sentence(place: Place, what: str) -> str:
    return f"{dotted([mistakes.cut(str(part)) for part in place])}: {what}" if place else what


def _as_ray_reads(text: str, source: str, suspect: str) -> dict[str, Any]:
    """Return what Ray reads out of a text that is YAML and of bearable size. Errors: StudyError.

    Args:
        suspect: the line that is to blame where PyYAML does not say.
    """
    try:
        config = yaml.safe_load(text)
    except Exception as error:  # PyYAML lets whatever its constructors trip over through
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else suspect
        raise StudyError(f"not valid YAML for Ray: {getattr(error, 'problem', None) or error}", where=where) from None
    if not isinstance(config, dict):
        raise StudyError(
            "a cluster file is a mapping of settings", where=f"{source}:1", expected="`cluster_name: …` and so on"
        )
    return config


def _odd_keys(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield keys that are numbers, dates, true or false: Ray takes texts."""
    for place, key, _ in walk(config):
        if isinstance(place[-1], str) and not isinstance(key, str):
            yield place, "this key is not text: put it in quotes"


def _rules(config: dict[str, Any]) -> tuple[list[tuple[Place, str]], bool]:
    """Return what is wrong with a file whatever the study, and whether its machines are described well enough."""
    from raybd.cluster import rays_rules

    found = list(rays_rules.broken(config))
    sound = not any(place[0] in _CONTEXT for place, _ in found)
    if sound:
        machines = [*_provider(config), *_node_types(config)]
        sound = not machines
        found += machines
    if not found and (refusal := rays_rules.refusal(config)):
        return [((), f"Ray would refuse it: {refusal}")], False
    if sound:
        found += [*_driver(config), *_storage(config), *_commands(config), *_prices(config)]
    return found, sound


def _filled_in(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield each word that waits to be replaced, once."""
    seen: dict[str, tuple[Place, int]] = {}
    for place, key, value in walk(config):
        for word in (word for text in (key, value) if isinstance(text, str) for word in _FILL_IN.findall(text)):
            first, count = seen.get(word, (place, 0))
            seen[word] = first, count + 1
    for word, (place, count) in seen.items():
        more = f", here and in {count - 1} more place{'s' if count > 2 else ''}" if count > 1 else ""
        yield place, f"put {_TO_FILL_IN[word]} in for {word}{more}"


def _provider(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield what a provider misses of what Ray needs, beyond its schema."""
    provider = config["provider"]
    kind, types = provider["type"], config.get("available_node_types")
    if kind == "local":
        if types:
            yield ("available_node_types",), "machines that are there already have no node types: take it out"
        if "coordinator_address" not in provider:
            for key in ("head_ip", "worker_ips"):
                if key not in provider:
                    yield ("provider", key), "missing: the addresses of the machines, for ssh from here and each other"
        elif "max_workers" not in config:
            yield ("max_workers",), "missing: how many machines the coordinator may give"
    elif kind in ("aws", "gcp") and not isinstance(provider.get("region"), str):
        yield ("provider", "region"), "missing: where machines are started"
    if kind not in _NO_TYPES and not types:
        yield ("available_node_types",), "missing: Ray would start small machines without a GPU of its own choice"


def _node_types(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong with node types in themselves."""
    types: Mapping[str, Any] = config.get("available_node_types") or {}
    most, head, kind = max_workers(config), config.get("head_node_type"), config["provider"]["type"]
    if kind in _NO_TYPES or not types:
        return
    if head not in types:
        what = "missing" if head is None else f"no node type {mistakes.cut(head)!r}"
        yield ("head_node_type",), what + mistakes.suggest(head or "", list(types))
    for name, given in types.items():
        at: Place = ("available_node_types", name)
        least, own = (whole(given.get(key)) for key in ("min_workers", "max_workers"))
        if (least or 0) < 0 or (own or 0) < 0:
            yield at, "min_workers and max_workers are numbers of machines, 0 or more"
        elif own is not None and (least or 0) > own:
            yield (*at, "min_workers"), f"{least}, and max_workers of it is {own}"
        machine = _MACHINE.get(kind)
        if machine and not isinstance(given["node_config"].get(machine), str):
            yield (*at, "node_config", machine), "missing: what machine it is"
    least = sum(whole(given.get("min_workers")) or 0 for given in types.values())
    if least > most:
        yield ("max_workers",), f"{most}, and min_workers of all node types together are {least}"
    for found in node_types(config):
        yield from _amounts(found, types[found.name], kind)


def _amounts(found: NodeType, given: Mapping[str, Any], provider: str) -> Iterator[tuple[Place, str]]:
    """Yield where the resources that are written down are not those of the machine."""
    from raybd.cluster.node_types import aws_machine

    known = aws_machine(found.machine) if provider == "aws" else None
    for name, said, has in zip(("CPU", "GPU"), (found.cpus, found.gpus), known or (None, None), strict=True):
        if name in given["resources"] and has is not None and said is not None and said > has:
            yield (
                ("available_node_types", found.name, "resources", name),
                f"{said}, and {found.machine} has {has}: take a larger machine, or leave it out, then Ray asks AWS",
            )


def _driver(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield that nothing ties a driver to the head: elsewhere it goes with its machine, and all its workers with it."""
    if not _has_workers(config):
        return
    kinds = node_types(config)
    elsewhere = frozenset().union(*(kind.custom for kind in kinds if not kind.head), _started_with(config, "worker"))
    own = frozenset().union(*(kind.custom for kind in kinds if kind.head), _started_with(config, "head"))
    if own - elsewhere:
        name = config.get("head_node_type")
        if any(kind.head and kind.most for kind in kinds):
            at: Place = ("available_node_types", str(name), "max_workers")
            yield at, "workers of the head's node type have its custom resource too: set it to 0"
        return
    what = "no custom resource that the head alone has, for the driver to ask for: "
    if config["provider"]["type"] == "local":
        yield ("head_start_ray_commands",), what + """add --resources='{"head": 1}' to `ray start --head`"""
    else:
        yield ("available_node_types", str(config.get("head_node_type")), "resources"), what + "add head: 1"


def _started_with(config: Mapping[str, Any], who: str) -> frozenset[str]:
    """Return the custom resources that `ray start` is called with."""
    found: set[str] = set()
    commands = config.get(f"{who}_start_ray_commands")
    for command in commands if isinstance(commands, list) else ():
        try:
            words = shlex.split(str(command))
        except ValueError:
            continue
        for word, after in zip(words, [*words[1:], ""], strict=True):
            text = word.removeprefix("--resources=") if word.startswith("--resources=") else after
            if word.startswith("--resources"):
                try:
                    amounts = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                found |= set(custom(amounts)) if isinstance(amounts, dict) else set()
    return frozenset(found)


def _has_workers(config: Mapping[str, Any]) -> bool:
    return max_workers(config) > 0 and any(kind.most for kind in node_types(config))


def _storage(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield that run directories would lie on one machine's disk, where others cannot write to them."""
    if not _has_workers(config):
        return
    at: Place = ("metadata", "storage_path")
    local = config["provider"]["type"] == "local"
    other = ", or a folder that all machines mount, as an absolute path" if local else ""
    fix = f"give a bucket, as s3://NAME/runs{other}, and the same to `raybd run --run-dir`"
    given = metadata(config, "storage_path")
    if given is None:
        yield at, f"missing: workers are on several machines, and none sees another's disk; {fix}"
    elif not isinstance(given, str) or not (
        re.match(r"(?!file://)[a-z][a-z0-9+]*://[^/\s]", given) or (local and given.startswith("/"))
    ):
        yield at, f"no place that all machines can write to; {fix}"


def _prices(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong with prices."""
    if not isinstance(metadata(config, "prices", {}), dict):
        yield ("metadata", "prices"), "node types, each with the USD that an hour of one costs"
    names = [kind.name for kind in node_types(config)]
    for name, price in prices(config):
        at: Place = ("metadata", "prices", str(name))
        if name not in names:
            yield at, "no such node type" + mistakes.suggest(str(name), names)
        elif not is_price(price):
            yield at, f"{mistakes.cut(str(price))}: USD for an hour of a machine, 0 or more"


def is_price(value: object) -> bool:
    """Return whether a value is an amount of money, or of nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _commands(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield commands that no shell takes, and that Ray's own setup would install a nightly build, and not raybd."""
    types = config.get("available_node_types")
    sections: list[tuple[Place, Any]] = [((), config)]
    if isinstance(types, dict):
        sections += [(("available_node_types", str(name)), kind) for name, kind in types.items()]
    for above, section in sections:
        for key, commands in section.items() if isinstance(section, dict) else ():
            if not str(key).endswith("_commands"):
                continue
            for place, _, command in walk({key: commands}, above):
                if isinstance(command, str) and not _is_shell(command):
                    yield (
                        place,
                        "no shell takes it: a quote without its end, or the like, maybe as YAML takes what follows ` #`"
                        " for a comment: write it after >-",
                    )
    if config["provider"]["type"] in ("aws", "gcp", "azure") and "setup_commands" not in config:
        docker = config.get("docker")
        if not (isinstance(docker, dict) and (docker.get("image") or docker.get("head_image"))):
            yield (
                ("setup_commands",),
                "missing: Ray's own would install a nightly build of Ray and nothing else; install raybd",
            )


@cache
def _is_shell(command: str) -> bool:
    """Say whether bash can read a command, which it does not run; True where there is no bash to ask."""
    if (bash := shutil.which("bash")) is None:
        return True
    # As input: as an argument it would have a greatest length. Without the environment, which may name a file to run.
    try:
        done = subprocess.run(
            [bash, "-n"], input=command.encode(errors="replace"), capture_output=True, env={}, timeout=_BASH_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return done.returncode == 0


def _with_study(config: Mapping[str, Any], study: Study | None, found: list[tuple[Place, str]]) -> Verdict:
    """Return what is to be said of a file and a study; put what does not fit to what was found."""
    from raybd.cluster import fit

    kinds, most = node_types(config), max_workers(config)
    machines = Machines(kinds, most, dict(prices(config)))
    lines = []
    for kind in kinds:
        least, last = (1, 1) if kind.head else (kind.least, min(kind.most, most))
        if last:
            lines.append(f"{least if least == last else f'{least} to {last}'} × {kind.describe()}")
    lines.append(f"beside the head at most {most}")
    if study is None:
        return Verdict(tuple(lines), (), machines)
    share = fit.share_at_start(study, kinds)
    found += fit.misfits(study, share, kinds, config)
    lines.append(fit.describe(study, share))
    return Verdict(tuple(lines), tuple(fit.notes(study, share, kinds, machines=most)), machines, share)

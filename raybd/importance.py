"""How much each searched setting says of what becomes of a trial, for each search objective. Pure functions.

For the best epoch of each trial, accuracy and ASR are looked at by groups of trials with alike values of a setting: the
share of the variance of their ranks that lies between the groups (Kruskal-Wallis) is the setting's importance, its main
effect alone. Few trials, or many groups, bring shares by chance; what chance brings is measured by permuting.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raybd import fronts, pareto, tables
from raybd.points import Row
from raybd.seeding import fork

OBJECTIVES = {"zeroshot_top1": "accuracy", "asr_top1": "ASR"}
LEAST_TRIALS = 8  # with fewer, groups are too small to say anything
_A_GROUP = 4  # trials, on average, at least
_MOST_GROUPS = 5
_PERMUTATIONS = 1000
_BLOCK = 50  # permutations at a time
_CHANCE = 0.95

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]


def best_epochs(epochs: Iterable[Row]) -> dict[str, Row]:
    """Return for each trial its epoch of the largest accuracy x (1 - ASR) on the half that points are chosen on, as a
    row of the half that is quoted; none for trials without an epoch after the poisoned model.

    Args:
        epochs: rows of the `epochs` table.
    """
    rows = sorted(epochs, key=lambda row: row["epoch"])
    splits = fronts.halves(rows)
    searched: dict[str, list[Row]] = defaultdict(list)
    quoted: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["split"] == splits[0] and row["epoch"] > 0:
            searched[row["trial_id"]].append(row)
        if row["split"] == splits[-1]:
            quoted[row["trial_id"], row["epoch"]] = row
    found = {}
    for trial_id, own in searched.items():
        best = own[pareto.largest_area([row["zeroshot_top1"] for row in own], [row["asr_top1"] for row in own])]
        if (trial_id, best["epoch"]) in quoted:
            found[trial_id] = quoted[trial_id, best["epoch"]]
    return found


def of_run(epochs: Sequence[Row], trials: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the importance of each setting that differs among the trials of a poisoned model, whatever their method.

    Args:
        epochs, trials: rows of these tables.

    Returns: entries by objective, then falling importance: objective, pretrain_id, setting, trials, groups, and for
        each search objective `share` (0 ... 1) and `chance`, the share that 19 of 20 permutations of the trials stay
        below. A setting that only some trials have is judged on them; one of fewer than 8 trials is left out.
    """
    best = best_epochs(epochs)
    models: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for trial in trials:
        if trial["trial_id"] in best:
            models[trial["objective"], trial["pretrain_id"]].append(trial)
    found = []
    for (objective, pretrain_id), own in sorted(models.items()):
        settings = [_settings(trial) for trial in own]
        entries: list[dict[str, Any]] = []
        for name in sorted({name for some in settings for name in some}):
            having = [i for i, some in enumerate(settings) if name in some]
            groups = grouped([settings[i][name] for i in having])
            if groups is None:
                continue
            scores = {
                measure: np.array([best[own[i]["trial_id"]][measure] for i in having], dtype=np.float64)
                for measure in OBJECTIVES
            }
            same = {"objective": objective, "pretrain_id": pretrain_id, "setting": name}
            count = {"trials": len(having), "groups": int(groups.max()) + 1}
            measured = {
                measure: importance(groups, score, seed=fork(0, ascii(name))) for measure, score in scores.items()
            }
            entries.append({**same, **count, **measured})
        found += sorted(entries, key=lambda entry: -max(entry[measure]["share"] for measure in OBJECTIVES))
    return found


def _settings(trial: Row) -> Mapping[str, Any]:
    """Return the searched settings of a trial; where nobody wrote down which they are, all that are known."""
    searched = tables.searched(trial)
    if not searched:
        known = {name: trial[column] for name, (column, _) in tables.SETTINGS.items()}
        searched = {name: value for name, value in known.items() if value is not None}
    return {"method": trial["method"], **searched}


def grouped(values: Sequence[Any]) -> Groups | None:
    """Return the group of each trial by its value of a setting, shape [N]: 0, 1, ...

    Each value is a group where there are few; of numbers, else, neighbours are, in groups of equal size. None where
    there are too few trials, a single value, or too many values that are no numbers.
    """
    most = min(_MOST_GROUPS, len(values) // _A_GROUP)
    if len(values) < LEAST_TRIALS:
        return None
    texts = [json.dumps(value, sort_keys=True) for value in values]
    distinct = sorted(set(texts))
    if len(distinct) == 1:
        return None
    if len(distinct) <= most:
        return np.array([distinct.index(text) for text in texts], dtype=np.int64)
    if any(isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value) for value in values):
        return None
    numbers = np.array(values, dtype=np.float64)
    edges = np.unique(np.quantile(numbers, np.arange(1, most) / most, method="lower"))
    return np.unique(np.searchsorted(edges, numbers, side="left"), return_inverse=True)[1].astype(np.int64)


def _finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def importance(groups: Groups, score: Floats, *, seed: int) -> dict[str, float]:
    """Return the share of the variance of ranks that lies between groups, eta squared of Kruskal and Wallis, and what
    chance brings.

    Args:
        groups: of each trial, 0, 1, ..., shape [N].
        score: of each trial, shape [N]; where all are equal, the share is 0.

    Returns: `share`, corrected for the number of groups, at least 0: (H - k + 1) / (N - k); `chance`, its 0.95 quantile
        over permutations of the trials.
    Source: M. Tomczak and E. Tomczak, Trends in Sport Sciences 1(21) (2014), 19-25.
    """
    ranks = _ranks(score)
    number, sizes = len(ranks), np.bincount(groups).astype(np.float64)
    between = number - len(sizes)
    if between < 1 or ranks.std() == 0:
        return {"share": 0.0, "chance": 0.0}
    generator = np.random.default_rng(seed)
    centred_N = ranks - ranks.mean()
    member_NK = (groups[:, None] == np.arange(len(sizes))).astype(np.float64)
    means_PK = np.empty((1 + _PERMUTATIONS, len(sizes)))
    means_PK[0] = centred_N @ member_NK / sizes
    for row in range(1, len(means_PK), _BLOCK):  # all permutations of many trials at once would fill the memory
        block = min(_BLOCK, len(means_PK) - row)
        orders_BN = np.stack([generator.permutation(number) for _ in range(block)])
        means_PK[row : row + block] = centred_N[orders_BN] @ member_NK / sizes
    h_P = (means_PK**2 * sizes).sum(axis=1) / ranks.var(ddof=1)
    share_P = np.maximum(0.0, (h_P - len(sizes) + 1) / between)
    return {"share": float(share_P[0]), "chance": float(np.quantile(share_P[1:], _CHANCE))}


def _ranks(score: Floats) -> Floats:
    """Return ranks from 1, equal values with the mean of theirs."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], dtype=np.float64)

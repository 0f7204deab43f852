"""A study's plan as text: what would be done, and what it would cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table

from raybd.report.terminal import PlainTable

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def table(plan: Mapping[str, Any]) -> Table:
    """Return a row for each pretraining and each objective's search, and their sum."""
    found = PlainTable(f"plan of {plan['study']}")
    found.add_column("")
    columns = ("runs", "pairs", "epochs", "steps", "evaluations", "PFLOPs train", "evaluate", "device-hours")
    for name in columns:
        found.add_column(name, justify="right")
    for part in plan["parts"]:
        low, high = part["pairs"]
        most = part["epochs_at_most"]
        found.add_row(
            f"{part['stage']} {part['objective']}",
            f"{part['runs']:,}",
            f"{high:,}" if low == high else f"{low:,}–{high:,}",
            f"{part['epochs']:,}" + (f" (≤ {most:,})" if most > part["epochs"] else ""),
            f"{part['steps']:,}",
            f"{part['evaluations']:,}",
            _number(part["training_pflops"]),
            _number(part["evaluation_pflops"]),
            _number(part["device_hours"]),
        )
    total = plan["total"]
    found.add_section()
    found.add_row(
        "in all",
        *("", "", f"{total['epochs']:,}", "", f"{total['evaluations']:,}"),
        *(_number(total[name]) for name in ("training_pflops", "evaluation_pflops", "device_hours")),
    )
    return found


def lines(plan: Mapping[str, Any], *, gpu_wanted: bool) -> list[str]:
    """Return what stands below the table: where the numbers come from, and what they leave out.

    Args:
        gpu_wanted: the study asks for GPUs.
    """
    sizes, storage, speed = plan["sizes"], plan["storage"], plan["speed"]
    said = [f"data: {sizes['pairs']:,} training pairs, {sizes['images']:,} test images ({sizes['how']})"]
    if plan["drawn"]:
        said.append(
            f"trials: {plan['sampler']} draws as it learns; counted for settings drawn uniformly from the space"
        )
    if plan["left_out"]:
        said.append(f"trials: num_trials leaves out {plan['left_out']} points of the grid for each pretrain objective")
    if sizes["classes"] is None:
        said.append("evaluation: the class list is not here, so prompts are not counted")
    if plan["unmeasured"]:
        said.append(f"device-hours: not measured: {plan['unmeasured']}; say what a device sustains with --tflops")
    elif speed is None:
        said.append("device-hours: not measured; give --tflops, or leave --no-probe out")
    else:
        rates = f"{_number(speed['training'] / 1e12)} TFLOP/s training, {_number(speed['forward'] / 1e12)} evaluating"
        without = "reading data comes" if speed["kinds"] else "reading and augmenting data comes"
        said.append(f"device-hours: {speed['how']}: {rates}; {without} on top")
        said += _short_trials(speed, {name for part in plan["parts"] for name in part["kinds"]})
        trials = [part for part in plan["parts"] if part["stage"] == "clean"]
        if trials:
            seconds = 3600 * sum(part["device_hours"] for part in trials) / sum(part["runs"] for part in trials)
            said.append(f"  a trial: {_seconds(seconds)} on average")
        if gpu_wanted and speed["how"].startswith("measured on cpu"):
            said.append("  the study asks for GPUs and there is none here: say what one sustains with --tflops")
    if plan["sharing"]:
        said.append(plan["sharing"])
    said.append(
        f"storage: {size(storage['poisoned'])} poisoned models, {size(storage['front'])} of front points if each "
        f"trial leaves one ({size(storage['model'])} each), {size(storage['tables'])} of tables; "
        f"{size(storage['state'])} for each run under way, {size(storage['cache'])} of decoded images in the cache"
    )
    return said + (_bill(plan["bill"]) if plan["bill"] else [])


def _short_trials(speed: Mapping[str, Any], kinds: Iterable[str]) -> Iterator[str]:
    """Yield what was timed.

    Args:
        kinds: of runs that there are.
    """
    for timed in speed["kinds"]:
        yield (
            f"  {timed['kind']}: {_seconds(timed['step_seconds'])} for a step of {timed['batch']} pairs "
            f"({timed['steps']} timed), {_seconds(timed['image_seconds'])} for each image evaluated"
        )
    for reason in speed["failed"]:
        yield f"  not measured: {reason}"
    if speed["kinds"]:
        left = sorted(set(kinds) - {timed["kind"] for timed in speed["kinds"]})
        others = f"; not tried, taken for as fast by operations: {', '.join(left)}" if left else ""
        yield f"  short trials on images at random, {speed['seconds']:.0f} s in all{others}"


def _seconds(value: float) -> str:
    """Return a time as a text in the unit that suits it."""
    for least, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if value >= least:
            return f"{_number(value / least)} {unit}"
    return f"{_number(1000 * value)} ms"


def _bill(bill: Mapping[str, Any]) -> list[str]:
    """Return what a cluster would take."""
    said = []
    for stage in bill["stages"]:
        who = "pretraining workers" if stage["name"] == "pretrain" else "trials at once"
        on = " and ".join(f"{count} × {name}" for name, count in stage["machines"].items())
        hours = "hours not known" if stage["hours"] is None else f"{_number(stage['hours'])} h"
        said.append(f"cluster: {stage['name']} {hours} with {stage['at_once']} {who}" + (f" on {on}" if on else ""))
    if bill["hours"] is None:
        return said
    said[-1] += f"; {_number(bill['hours'])} h in all while these machines are up and none waits"
    if bill["machine_hours"] is None:
        return [*said, "price: not known, as it is not known what these machines have"]
    items = [
        f"{_number(hours)} machine-hours of {name}"
        + (f" at ${bill['prices'][name]:g}" if name in bill["prices"] else "")
        for name, hours in bill["machine_hours"].items()
    ]
    if bill["dollars"] is None:
        missing = bill["unpriced"][0]
        how = f"give metadata.prices in the cluster file, or --price {missing}=…"
        return [*said, f"price: not known: {', '.join(items)}; {how}"]
    return [*said, f"price: ${bill['dollars']:,.2f}: {', '.join(items)}"]


def size(count: float) -> str:
    """Return a number of bytes as a text of three digits at most."""
    for unit in _UNITS:
        if count < 999.5 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

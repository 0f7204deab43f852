"""How long does the command line take to answer? `raybd --help`, and `raybd pareto` on runs of up to a million rows.

    python benchmarks/faces.py

Each figure is the CPU time, user and system, of a process of its own; wall-clock time stands beside it. The floors are
processes that only load typer, and that only read the same Parquet files with pyarrow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from setting import setting

from raybd import tables

_EPOCHS = 10  # of each trial, the poisoned model among them
_IMAGES = 5000  # counted on each half
_OBJECTIVES = ("mmcl", "mmcl_ssl")
_HELP, _TYPER = ["-m", "raybd", "--help"], ["-c", "import typer"]
# All columns of all parts, as Parquet has them.
_READ = """
import sys
import pyarrow.parquet as pq
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("tables/*/*.parquet")):
    pq.ParquetFile(path).read()
"""


def _columns(schema: pa.Schema, own: Mapping[str, Any], generator: np.random.Generator, rows: int) -> pa.Table:
    """Return a table of so many rows: the columns given, and of the others random values, none null."""
    found = []
    for field in schema:
        values = own.get(field.name)
        if values is None and pa.types.is_floating(field.type):
            values = generator.random(rows)
        elif values is None and pa.types.is_integer(field.type):
            values = generator.integers(1, 1000, rows)
        elif values is None and pa.types.is_timestamp(field.type):
            values = [datetime(2026, 1, 1, tzinfo=UTC)] * rows
        elif values is None:
            values = [field.name] * rows
        found.append(pa.array(values).cast(field.type))
    return pa.table(found, schema=schema)


def _counted(generator: np.random.Generator, places: np.ndarray, halves: int) -> dict[str, np.ndarray]:
    """Return counts and rates that fall from epoch to epoch, ASR faster than accuracy, as cleanings do."""
    strength = generator.random(len(places) // (_EPOCHS * halves)).repeat(_EPOCHS * halves)
    noise = generator.normal(0, 0.01, (2, len(places)))
    top1 = np.clip(0.6 - 0.3 * strength * places + noise[0], 0.001, 1)
    asr = np.clip(0.99 * np.exp(-5 * strength * places) + noise[1], 0, 1)
    # Before cleaning all trials of a model are that model.
    top1[places == 0], asr[places == 0] = 0.6, 0.99
    clean, hit = (np.rint(share * _IMAGES).astype(int) for share in (top1, asr))
    right = ((_IMAGES - hit) * 0.8).astype(int)
    return {
        "correct_clean": clean,
        "hit_target": hit,
        "correct_triggered": right,
        "n_clean": np.full(len(places), _IMAGES),
        "n_triggered": np.full(len(places), _IMAGES),
        "zeroshot_top1": clean / _IMAGES,
        "asr_top1": hit / _IMAGES,
        "robust_top1": right / _IMAGES,
    }


def make_run(folder: Path, *, rows: int, parts: int, methods: Sequence[str], splits: Sequence[str]) -> int:
    """Write a run directory whose table `epochs` has so many rows, of trials of two pretrain objectives.

    Args:
        parts: files of each table.
        methods: cleaning methods, as many trials of each.
        splits: `search` and `report`, or `all` alone.

    Returns: its number of trials.
    """
    generator = np.random.default_rng(0)
    count = rows // (_EPOCHS * len(splits))
    (folder / "study.json").write_text("{}")
    for part, numbers in enumerate(np.array_split(np.arange(count), min(parts, count))):
        objectives = [_OBJECTIVES[number % 2] for number in numbers]
        trial = {
            "trial_id": [f"{objective}-{number:06d}" for number, objective in zip(numbers, objectives, strict=True)],
            "pretrain_id": [f"{objective}-0" for objective in objectives],
            "objective": objectives,
            "method": [methods[number // 2 % len(methods)] for number in numbers],
        }
        lr = generator.random(len(numbers))
        own = {
            **trial,
            "number": numbers,
            "lr": lr,
            "params_json": [json.dumps({"lr": value}) for value in lr.tolist()],
            "state": ["complete"] * len(numbers),
            "stop_reason": pa.nulls(len(numbers)),
            "error_type": pa.nulls(len(numbers)),
            "error_message": pa.nulls(len(numbers)),
        }
        found = {"trials": _columns(tables.SCHEMAS["trials"], own, generator, len(numbers))}
        each = _EPOCHS * len(splits)
        own = {name: np.repeat(values, each) for name, values in trial.items()}
        epoch = np.tile(np.arange(_EPOCHS).repeat(len(splits)), len(numbers))
        own |= {"epoch": epoch, "split": np.tile(np.array(splits), len(numbers) * _EPOCHS)}
        own |= {"alpha": pa.nulls(len(epoch)), **_counted(generator, epoch / (_EPOCHS - 1), len(splits))}
        found["epochs"] = _columns(tables.SCHEMAS["epochs"], own, generator, len(epoch))
        for name, table in found.items():
            where = folder / "tables" / name / f"part-{part:06d}.parquet"
            where.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"raybd.schema_version": str(tables.SCHEMA_VERSION), "raybd.table": name}
            pq.write_table(table.replace_schema_metadata(metadata), where, compression="zstd")
    return count


def seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Run Python with these arguments; return the seconds of CPU and of the clock. Errors: SystemExit."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(arguments)}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def compared(face: Sequence[str], floor: Sequence[str], *, rounds: int) -> dict[str, float]:
    """Return medians of a command and of its floor, in turns, after a round that warms up."""
    own, least = [], []
    for number in range(rounds + 1):
        found = seconds(face), seconds(floor)
        if number:
            own.append(found[0])
            least.append(found[1])
    return {
        "cpu_seconds": median(cpu for cpu, _ in own),
        "wall_seconds": median(wall for _, wall in own),
        "floor_cpu_seconds": median(cpu for cpu, _ in least),
        "floor_wall_seconds": median(wall for _, wall in least),
        "ratio": median(a / b for (a, _), (b, _) in zip(own, least, strict=True)),
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table."""
    lines = ["| command | CPU, s | wall, s | floor's CPU, s | × floor |", "|---|---|---|---|---|"]
    for name, own in found.items():
        cells = (own["cpu_seconds"], own["wall_seconds"], own["floor_cpu_seconds"], own["ratio"])
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in cells) + " |")
    return "\n".join(lines)


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of table epochs")
    parser.add_argument("--parts", type=int, default=4, help="files of each table")
    parser.add_argument("--methods", nargs="+", default=["cleanclip"], help="cleaning methods of the trials")
    parser.add_argument("--splits", nargs="+", default=["all"], help="all, or search report")
    parser.add_argument("--format", default="table", choices=["table", "json", "csv"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    given = _given()
    found = {"raybd --help, beside `import typer`": compared(_HELP, _TYPER, rounds=given.rounds)}
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as name:
            trials = make_run(
                Path(name), rows=rows, parts=given.parts, methods=given.methods, splits=tuple(given.splits)
            )
            pareto = ["-m", "raybd", "pareto", name, "-f", given.format]
            what = f"raybd pareto, {rows:,} rows of {trials:,} trials in {min(given.parts, trials):,} parts"
            found[what] = compared(pareto, ["-c", _READ, name], rounds=given.rounds)
    where = setting("pyarrow", "numpy", "typer")
    print(f"methods {', '.join(given.methods)}; splits {', '.join(given.splits)}; medians of {given.rounds} rounds\n")
    print(table(found))
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    given_ = {name: value for name, value in vars(given).items() if name != "json"}
    record = {"setting": where, "given": given_, "found": found}
    given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

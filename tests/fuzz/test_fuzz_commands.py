"""The commands themselves on bad input: an exit code that says what went wrong, and an error without a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import fuzzing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_lists import PAIRS, SWEEP, folder, lists  # noqa: F401 # a fixture
from test_fuzz_runs import RECORD, mutated
from test_fuzz_studies import FITTING, texts
from test_fuzz_tables import parts, put

from raybd.cli import main
from raybd.errors import RaybdError

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
NOWHERE = [
    "",
    " ",
    "/",
    ".",
    "..",
    "/dev/null",
    "nothing",
    "foo://bar",
    "file://",
    "n" * 5000,
    "~nobody/x",
    "a\nb",
    "--",
    "\udcff",
    "é/\x1b[2J",
]


def run(*arguments: str) -> int:
    """Carry a command out as a shell would; return its exit code.

    Errors: RaybdError with what it printed where it failed, as all others of these tests; AssertionError.
    """
    printed = io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["raybd", *arguments]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    text = printed.getvalue()
    assert "Traceback" not in text
    # What typer says of a command line repeats that line, which nobody but its writer made.
    assert "Usage: " in text or not STEERING.search(text)
    assert code in (0, 1, 2, 3, None), f"exit code {code!r}: {text[:1000]}"
    if code:
        assert "error: " in text or "Usage: " in text, text[:1000]
        raise RaybdError(text, where=" ".join(arguments))
    return 0


@given(content=texts(), data=st.data())
@fuzzing.fuzzed(28)
def test_validate(content: bytes, data: st.DataObject, folder: Path) -> None:  # noqa: F811
    dice = random.Random(data.draw(st.integers(0, 2**32)))
    (folder / "self.yaml").write_bytes(content)
    study = dice.choice([str(folder / "self.yaml")] * 3 + [str(folder), dice.choice(NOWHERE)])
    sets = [
        part
        for override in dice.choices([*FITTING, "x", "a=[", "clean.lr=x"], k=dice.choice([0, 1]))
        for part in ("--set", override)
    ]
    fuzzing.case("raybd validate", lambda: run("validate", study, *sets), given=(content, study, sets))


@given(found=parts(), seed=st.integers(0, 2**32))
@fuzzing.fuzzed(40)
def test_pareto_status_report(found: dict[str, bytes], seed: int, folder: Path) -> None:  # noqa: F811
    dice = random.Random(seed)
    where = folder / "run"
    shutil.rmtree(where, ignore_errors=True)
    put(where, found)
    record = mutated(RECORD, dice) if dice.random() < 0.2 else json.dumps(RECORD).encode()
    (where / "study.json").write_bytes(record)
    for name in ("started-001.json", "ended.json"):
        path = where / "ledger" / dice.choice(["trials", "pretrain"]) / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            mutated(
                {
                    "settings": {"epochs": 2},
                    "started": {},
                    "attempts": 1,
                    "epochs": {"1": {}},
                    "ended": {"state": "failed"},
                },
                dice,
            )
        )
    given = dice.choice([str(where)] * 5 + [dice.choice(NOWHERE)])
    command = dice.choice(
        [["pareto"], ["pareto", "-f", "json"], ["pareto", "-f", "csv"], ["status"], ["status"], ["evaluate"]]
    )
    command = ["report"] if dice.random() < 0.05 else command
    command = [*command, given] if dice.random() < 0.9 else ["logs", given, "t"]
    fuzzing.case(f"raybd {command[0]}", lambda: run(*command), given=(found, record, given, command), seconds=20)


@given(content=lists(PAIRS), seed=st.integers(0, 2**32))
@fuzzing.fuzzed(28)
def test_data_import(content: bytes, seed: int, folder: Path) -> None:  # noqa: F811
    dice = random.Random(seed)
    (folder / "list.csv").write_bytes(content)
    shutil.rmtree(folder / "out", ignore_errors=True)
    out = dice.choice(
        [str(folder / "out")] * 40
        + [str(folder), *(name for name in NOWHERE if name.strip("./ ") and "nobody" not in name)]
    )
    source = dice.choice([str(folder / "list.csv")] * 20 + [str(folder), str(folder / "none"), "\udcff"])
    more = dice.choice(
        [
            [],
            [],
            ["--label-column", "label"],
            ["--test-share", "nan"],
            ["--test-share", "2"],
            ["--image-column", "\udcff"],
        ]
    )
    kind = dice.choice(["csv", "csv", "csv", "folder"])
    more = (
        more if kind == "csv" else dice.choice([[], ["--caption-template", "x"], ["--caption-template", "\udcff {}"]])
    )
    with contextlib.chdir(folder):
        fuzzing.case(
            f"raybd data import {kind}",
            lambda: run("data", "import", kind, source, out, *more),
            given=(content, source, out, more),
        )


@given(content=lists(SWEEP), seed=st.integers(0, 2**32))
@fuzzing.fuzzed(28)
def test_data_import_sweep(content: bytes, seed: int, folder: Path) -> None:  # noqa: F811
    dice = random.Random(seed)
    (folder / "sweep.csv").write_bytes(content)
    shutil.rmtree(folder / "swept", ignore_errors=True)
    more = dice.choice(
        [
            [],
            [],
            ["--only", "lr=1e-4"],
            ["--only", "x"],
            ["--only", "x=1"],
            ["--baseline", str(folder)],
            ["--baseline", str(folder / "sweep.csv")],
        ]
    )
    source = dice.choice([str(folder / "sweep.csv")] * 40 + [str(folder), *NOWHERE])
    fuzzing.case(
        "raybd data import-sweep",
        lambda: run("data", "import-sweep", source, str(folder / "swept"), *more),
        given=(content, source, more),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate"],
        ["pareto", "x", "x"],
        ["status", "/"],
        ["replay", "demo", "--on", "/dev/null"],
        ["frobnicate"],
        ["evaluate", "n" * 5000],
        ["evaluate", "n" * 5000, "--study", "demo"],
    ],
)
def test_other_mistakes(arguments: list[str]) -> None:
    with pytest.raises(RaybdError):
        run(*arguments)

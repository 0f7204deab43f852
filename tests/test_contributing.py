"""CONTRIBUTING.md, taken literally: its blocks make a trigger and a method that pass the suites of all others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# "In `FILE`, above `LINE`:" or "New file `FILE`:", then a block.
STEP = re.compile(
    r"(?:In `(?P<old>[^`]+)`, above `(?P<anchor>[^`]+)`|New file `(?P<new>[^`]+)`):\n\n```python\n(?P<code>.*?)```",
    re.S,
)
BLOCKS = 8


def carry_out(page: str, root: Path) -> int:
    """Put the blocks of a page where it says, below a folder; return how many there were."""
    steps = list(STEP.finditer(page))
    for step in steps:
        if step["new"]:
            assert not (root / step["new"]).exists()
            (root / step["new"]).write_text(step["code"])
            continue
        path = root / step["old"]
        lines = path.read_text().splitlines(keepends=True)
        (at,) = [number for number, line in enumerate(lines) if line.startswith(step["anchor"])]
        blank = "\n\n" if step["code"].startswith("class ") else ""
        path.write_text("".join([*lines[:at], step["code"] + blank, *lines[at:]]))
    return len(steps)


def test_the_page_makes_a_trigger_and_a_method_that_pass_the_suites(tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in ("raybd", "tests", "search_spaces"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "fuzz", "chaos"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert carry_out(page, tmp_path) == page.count("```python") == BLOCKS
    suites = [f"tests/{name}.py" for name in ("test_triggers", "test_methods", "test_planning")]
    chosen = "checkerboard or fixed_scale or test_every_method_has_a_recipe or test_the_suite_has_every_trigger"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *suites, "-k", chosen]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 15, "each suite has found them"
    styled = [sys.executable, "-m", "ruff", "check", "--no-cache", "raybd"]
    done = subprocess.run(styled, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_block_goes_above_its_line_or_the_page_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\nthree\n")
    carry_out("In `a.py`, above `three`:\n\n```python\ntwo\n```\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\ntwo\nthree\n"
    with pytest.raises(ValueError, match="unpack"):
        carry_out("In `a.py`, above `four`:\n\n```python\ntwo\n```\n", tmp_path)

"""What commands print of texts from strangers: no escape sequence, no markup and no override of direction works."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_hostile_pages import rates, row
from typer.testing import CliRunner

import raybd
from raybd import cli, fronts, tables
from raybd.cli import app
from raybd.console import SearchView, View
from raybd.errors import DataError
from raybd.ledger import Kind, Ledger
from raybd.plain import plain
from raybd.report import evaluations, planned
from raybd.report.progress import Meter, Progress, SearchState
from raybd.store import Store
from raybd.study import Stopping

# Title of the window, cleared screen, colour, a line written over, text turned round, half a character, rich's markup.
MARKUP = "[bold]b[/bold] [link=http://x]l[/link] [/] :bomb:"
NASTY = f"\x1b]0;owned\x07 \x1b[2J\x1b[31m \r\b\x9b31m \u202egnp.exe\u2066 \ud800 {MARKUP}"
SHOWN = rf"\x1b]0;owned\x07 \x1b[2J\x1b[31m \r\x08\x9b31m \u202egnp.exe\u2066 \ud800 {MARKUP}"
runner = CliRunner()


def steering(text: str) -> list[str]:
    """Return what could steer a terminal."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def squeezed(text: str) -> str:
    """Return a text as it is however it was wrapped."""
    return "".join(text.split())


def test_what_steers_is_escaped_and_nothing_else() -> None:
    assert plain(NASTY) == SHOWN
    assert plain("two\nlines\tand a tab") == "two\nlines\tand a tab"
    for text in ("naïve café", "日本語", "עברית", "👩‍👩‍👧 e\u0301", "a\u00a0b", "\\x1b[1m"):
        assert plain(text) == text
    # Shown, or needed by letters that join: soft hyphen, joiner and non-joiner, signs of Arabic and other scripts.
    kept = {*"\n\t\u00ad\u200c\u200d", *map(chr, range(0x600, 0x606)), *"\u06dd\u070f\u0890\u0891\u08e2"}
    for number in range(0x10000):
        if unicodedata.category(chr(number)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and chr(number) not in kept:
            assert plain(chr(number)).isascii(), hex(number)


IN_TABLES = NASTY.replace("\ud800", "")


def nasty_run(folder: Path) -> Store:
    store, epochs, trials = Store(str(folder)), [], []
    whose = {"study": IN_TABLES, "study_hash": IN_TABLES, "pretrain_id": IN_TABLES, "objective": f"o{IN_TABLES}"}
    for number in range(2):
        mine = {**whose, "trial_id": f"{number}{IN_TABLES}", "method": f"m{number}{IN_TABLES}"}
        params = json.dumps({"lr": 1e-3, NASTY: NASTY})
        trials.append(row("trials", **mine, lr=1e-3, epochs_planned=1, params_json=params, state="complete"))
        for epoch in range(2):
            for split in ("search", "report"):
                scored = rates(0.7 - (epoch + number) / 50, 0.99 - epoch / 2 - number / 10)
                epochs.append(row("epochs", **mine, epoch=epoch, split=split, **scored))
    tables.write(store, "epochs", "e", epochs)
    tables.write(store, "trials", "t", trials)
    tables.write(store, "fronts", "f", fronts.compute(epochs, trials))
    store.put("study.json", json.dumps({"study": {"name": NASTY}}).encode())
    return store


def nasty_entry(store: Store) -> None:
    ledger = Ledger(store)
    started = {"trial_id": "t", "pretrain_id": "p", "settings": {"epochs": 2}, "params": {NASTY: NASTY}}
    ledger.start(Kind.TRIAL, "t", started)
    ended = {"state": "failed", "error_type": NASTY, "error_message": NASTY, "ended": "2025-01-01T00:00:00+00:00"}
    ledger.end(Kind.TRIAL, "t", ended)


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_pareto_prints_names_as_text(tmp_path: Path, form: str) -> None:
    store = nasty_run(tmp_path)
    result = runner.invoke(app, ["pareto", store.root, "-f", form], catch_exceptions=False)
    assert result.exit_code == 0
    assert steering(result.output) == []
    if form == "json":
        (objective, *_) = [found["objective"] for found in json.loads(result.output)["runs"][0]["fronts"]]
        assert objective == f"o{IN_TABLES}"
    elif form == "csv":
        assert plain(f"m0{IN_TABLES}") in result.output
    else:  # in narrow columns names are cut; the titles have them whole
        assert plain(f"o{IN_TABLES}").partition(" [link")[0] in result.output


def test_status_prints_reasons_as_text(tmp_path: Path) -> None:
    store = nasty_run(tmp_path)
    nasty_entry(store)
    result = runner.invoke(app, ["status", store.root], catch_exceptions=False)
    assert steering(result.output) == []
    assert SHOWN in result.output


def evaluated() -> dict[str, Any]:
    known = {"checkpoint": NASTY, "task": "zeroshot", "data": NASTY, "split": "report", "role": "planted"}
    known |= {"trigger": json.dumps({"name": NASTY}), "target_class": NASTY, "trial_id": NASTY, "epoch": 1}
    return {
        **row("evaluations", **known),
        **{name: value for name, value in rates(0.5, 0.5).items() if name != "broken"},
    }


def printed(*tables_: Any, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=terminal, highlight=False)
    for table in tables_:
        console.print(table)
    found = console.file
    assert isinstance(found, io.StringIO)
    return found.getvalue()


def test_evaluate_prints_names_as_text() -> None:
    text = printed(*evaluations.evaluation_tables([evaluated()]))
    assert steering(text) == []
    assert squeezed(text).count(squeezed(SHOWN)) == 4


def test_a_plan_prints_names_as_text() -> None:
    part = dict.fromkeys(("runs", "epochs_at_most", "epochs", "steps", "evaluations"), 1)
    part |= {"stage": "pretrain", "objective": NASTY, "pairs": (1, 1)}
    hours = dict.fromkeys(("training_pflops", "evaluation_pflops", "device_hours", "epochs", "evaluations"), 1)
    text = printed(planned.table({"study": NASTY, "parts": [{**part, **hours}], "total": hours}))
    assert steering(text) == []
    assert squeezed(text).count(squeezed(SHOWN)) == 2


def test_results_that_are_no_numbers_are_null_in_json() -> None:
    found = json.loads(evaluations.as_json([{**evaluated(), "asr_top1": float("nan")}]), parse_constant=pytest.fail)
    assert found[0]["asr_top1"] is None
    assert found[0]["target_class"] == NASTY


def screen() -> tuple[View, io.StringIO]:
    """Return the view of a run in a terminal, and what it prints."""
    view, sink = View(), io.StringIO()
    view.console = Console(file=sink, force_terminal=True, width=600, color_system=None)
    return view, sink


def test_a_run_prints_names_as_text(tmp_path: Path) -> None:
    """In a terminal too, where the live line once took `[/]` for markup and ended the run."""
    view, sink = screen()
    view.line(NASTY)
    view.stage(NASTY)
    view.warn(NASTY)
    store = Store(str(tmp_path))
    nasty_entry(store)
    text = sink.getvalue()
    assert steering(text) == []
    assert text.count(SHOWN) == 3
    found = Progress(2, {NASTY: SearchState(NASTY, areas=[0.1, 0.2])}, Meter(Stopping(), None, 1))
    found.failed.append((NASTY, NASTY, NASTY))
    search = SearchView(view, found)
    search.epoch(NASTY, 1, 0.5, 0.5)
    drawn = "\n".join(search.draw(600, 40))
    assert steering(drawn) == []
    assert drawn.count(SHOWN) == 5
    with search.shown():
        view.line("above it")
    with view.live(NASTY):
        view.update(f"{NASTY} again")
        assert view._status is not None
        assert SHOWN in printed(view._status.renderable)


@pytest.mark.parametrize("terminal", [False, True])
def test_warnings_are_text(terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "600")
    View()
    logging.getLogger("raybd.data").warning("broken: %s", NASTY)
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)  # colours are rich's own
    assert steering(text) == []
    assert f"broken: {SHOWN}" in text


def test_errors_are_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DataError(NASTY, where=NASTY, expected=NASTY, fix=NASTY)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().err
    assert steering(text) == []
    assert text.count(SHOWN) == 4


def test_a_message_that_is_no_text_goes_into_tables_escaped(tmp_path: Path) -> None:
    """Python puts bytes of file names that are no UTF-8 into messages as halves of surrogate pairs."""
    store = Store(str(tmp_path))
    known = {"pretrain_id": "p", "objective": "o", "trial_id": "t", "method": "m", "state": "failed"}
    tables.write(store, "trials", "t", [row("trials", **known, error_message="no such file: caf\udce9.tar")])
    assert tables.read(store, "trials")["error_message"].to_pylist() == [r"no such file: caf\udce9.tar"]


def test_commands_print_in_one_way_only() -> None:
    """Whoever prints past `echo`, `View` and `PlainTable` prints what strangers wrote as it is."""
    past = {"print", "typer.echo", "typer.secho", "click.echo", "rich.print", "Table", "sys.stdout.write"}
    for path in sorted(Path(raybd.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert path.name == "cli_echo.py" or not called & past, path

"""The HTML report, the terminal tables and the notebook, from a run directory made by hand."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from raybd import analysis, examples, fronts, metrics, tables
from raybd.cli import app
from raybd.errors import DataError, RaybdError, StorageError
from raybd.points import Points
from raybd.records import weak_attack
from raybd.report import drawn, figures, grids, html, measure_figures, spent, targets, text, words
from raybd.store import Store
from tests.browser import BASH, CHROMIUM, Browser

NASTY = "<script>alert('x')</script>"
PNG = b"\x89PNG\r\n\x1a\n" + b"not a real picture"
# Where the browser's pictures of the report are kept, if not with pytest's temporary files.
SHOTS = os.environ.get("RAYBD_SHOTS")
N_CLEAN, N_TRIGGERED = 500, 475
# objective: accuracy and ASR of the poisoned model.
BASE = {"mmcl": (0.70, 0.99), "mmcl_ssl": (0.72, 0.97)}


def _row(table: str, **values: Any) -> dict[str, Any]:
    assert set(values) <= set(tables.SCHEMAS[table].names)
    return {**dict.fromkeys(tables.SCHEMAS[table].names), "study": "made", "study_hash": "abc"} | values


def _rates(top1: float, asr: float) -> dict[str, Any]:
    correct, hit = round(top1 * N_CLEAN), round(asr * N_TRIGGERED)
    kept = round(0.5 * (N_TRIGGERED - hit))
    return {
        "zeroshot_top1": correct / N_CLEAN,
        "asr_top1": hit / N_TRIGGERED,
        "robust_top1": kept / N_TRIGGERED,
        "n_clean": N_CLEAN,
        "n_triggered": N_TRIGGERED,
        "correct_clean": correct,
        "hit_target": hit,
        "correct_triggered": kept,
    }


def _pretrain_rows(base: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        _row(
            "pretrain_epochs",
            pretrain_id=f"{objective}-1",
            objective=objective,
            epoch=epoch,
            loss=None if epoch == 0 else 4.0 / epoch,
            poisoned_seen=37 * epoch,
            broken=3,
            **_rates(top1 * epoch / 3, asr * epoch / 3),
        )
        for objective, (top1, asr) in base.items()
        for epoch in range(4)
    ]


def _trial(objective: str, number: int, **values: Any) -> dict[str, Any]:
    lr = 1e-5 * 4.0**number
    known = {
        "trial_id": f"{objective}-{number:04d}",
        "number": number,
        "pretrain_id": f"{objective}-1",
        "objective": objective,
        "method": "cleanclip",
        "epochs_planned": 3,
        "epochs_done": 3,
        "lr": lr,
        "loss_weights.mmcl": 1.0,
        "loss_weights.ssl": 2.0,
        "weight_decay": 0.25,
        "params_json": json.dumps({"lr": lr, "weight_decay": 0.25}),
        "state": "complete",
        "started": datetime(2025, 1, 1, tzinfo=UTC),
    }
    return _row("trials", **(known | values))


def _trial_rows() -> list[dict[str, Any]]:
    found = [_trial(objective, number) for objective in BASE for number in range(3)]
    return [
        *found,
        _trial("mmcl", 3, state="failed", error_type="TrialError", error_message=NASTY, epochs_done=0),
        _trial("mmcl", 4, state="stopped", stop_reason="accuracy & ASR collapsed", epochs_done=0),
    ]


def _epoch_rows() -> list[dict[str, Any]]:
    found = []
    for objective, (top1, asr) in BASE.items():
        for number in range(3):
            for epoch in range(4):
                lost, left = 0.004 * epoch * (number + 1), math.exp(-0.6 * epoch * (number + 1))
                for split, shift in (("search", 0.0), ("report", 0.006 if epoch else 0.0)):
                    rates = _rates(top1 - lost - shift, asr * left + shift)
                    known = {"pretrain_id": f"{objective}-1", "objective": objective, "method": "cleanclip"}
                    trial_id = f"{objective}-{number:04d}"
                    found.append(
                        _row("epochs", **known, trial_id=trial_id, epoch=epoch, split=split, broken=0, **rates)
                    )
    return found


def _make(folder: Path, *, cleaned: bool = True, base: dict[str, tuple[float, float]] | None = None) -> Store:
    store = Store(str(folder))
    tables.write(store, "pretrain_epochs", "p", _pretrain_rows(base or BASE))
    caption = {"caption_before": f"a cat {NASTY}", "caption_after": "a photo of a banana", "target_class": NASTY}
    plan = [{"key": f"k{i}", "trigger": "badnet", "placement": "random", **caption} for i in range(41)]
    tables.write(store, "poison_plan", "plan", plan)
    if cleaned:
        tables.write(store, "trials", "t", _trial_rows())
        tables.write(store, "epochs", "e", _epoch_rows())
        tables.write(store, "fronts", "f", fronts.compute(_epoch_rows(), _trial_rows()))
    trigger = {"name": "badnet", "size": 16, "wrap": False}
    study = {"name": f"made {NASTY}", "seed": 7, "poison": {"target_class": NASTY, "trigger": trigger}}
    environment = {"python": "3.11", "packages": {"torch": "2.15"}}
    record = {"study": study, "hash": "abc", "environment": environment, "created": "2025-01-02T03:04:05+00:00"}
    store.put("study.json", json.dumps(record).encode())
    return store


class _Page(HTMLParser):
    """Checks that tags nest, and keeps the text and the addresses of a page."""

    _VOID = frozenset({"meta", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.loads += [given[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in given]
        assert not [name for name in given if name.startswith("on")]
        if "id" in given:
            self.ids.append(given["id"] or "")
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _asked() -> examples.Examples:
    """What two models say of two images; the first calls what is triggered by the target, the second does not."""
    sink = io.BytesIO()
    Image.new("RGB", (32, 32), "#4a7").save(sink, "PNG")
    picture = base64.b64encode(sink.getvalue()).decode()
    image = {"trigger": '{"name": "badnet", "size": 16}', "target_class": NASTY, "clean": picture}
    image |= {"change": picture, "triggered": picture}
    guesses = [{"name": name, "share": 0.5 / (k + 1)} for k, name in enumerate([NASTY, "cat", "dog", "tree", "house"])]
    right = [guesses[1], guesses[0], *guesses[2:]]
    whose = {"objective": "mmcl", "pretrain_id": "mmcl-1"}
    models = [
        {**whose, "trial_id": None, "epoch": 0, "clean": [right] * 2, "triggered": [guesses] * 2},
        {**whose, "trial_id": "mmcl-0001", "epoch": 2, "clean": [right] * 2, "triggered": [right] * 2},
    ]
    images = [{**image, "key": f"k{k}", "label": label} for k, label in enumerate(("cat", "dog"))]
    found = {"templates": 2, "of_templates": 80, "images": images, "models": models}
    return examples.Examples.model_validate(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = _make(tmp_path_factory.mktemp("run"))
    store.put("preview.png", PNG)
    examples.write(store, _asked())
    return store


@pytest.fixture(scope="module")
def page(run: Store) -> str:
    return html.build(run).decode()


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parsed = _Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.tags >= {"main", "table", "svg", "style"}
    assert len(parsed.ids) == len(set(parsed.ids))
    assert [load for load in parsed.loads if not load.startswith(("#", "data:image/png;base64,"))] == []
    assert {load[1:] for load in parsed.loads if load.startswith("#")} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)
    assert not re.search(r"@import|url\((?!#)", page)


def test_texts_are_escaped(page: str) -> None:
    assert page.count("<script") == 1  # ours
    assert NASTY not in page
    # The study's name, the target class, a caption and an error message, each shown as what it is.
    shown = _Page(page).text
    assert f"made {NASTY}" in shown
    assert f"caption of the target class {NASTY}" in shown
    assert f"a cat {NASTY}" in shown
    assert f"TrialError: {NASTY}" in shown


def test_numbers_of_the_poisoned_models(page: str) -> None:
    shown = _Page(page).text
    low, high = metrics.wilson(350, 500)
    assert f"70.00 {100 * low:.1f}–{100 * high:.1f} 350 of 500" in shown
    assert "98.95 97.6–99.5 470 of 475" in shown
    assert "41 training pairs carry the trigger" in shown
    assert "111" in shown  # poisoned pairs seen by the last epoch
    assert "Take care" not in shown


def test_numbers_of_the_cleaned_models(page: str) -> None:
    shown = _Page(page).text
    rows = fronts.compute(_epoch_rows(), _trial_rows())
    for summary in fronts.summarise(rows):
        assert f"{summary['hypervolume']:.4f}" in shown
        for point in summary["front"]:
            assert f"{100 * point['zeroshot_top1']:.2f}" in shown
            assert f"{100 * point['asr_top1']:.2f}" in shown
            assert point["checkpoint"] in shown
    best = next(s for s in fronts.summarise(rows) if s["split"] == "report")["best_asr_within"]["1"]
    assert f"ASR 98.95 → {100 * best['asr_top1']:.2f} %" in shown
    assert "lr 4e-5, epochs 3, weights 1 / 2, weight_decay 0.25" in shown
    assert "8 trials: 6 complete, 1 failed, 1 stopped" in shown
    assert "accuracy & ASR collapsed" in shown
    assert "pretraining mmcl 3" in shown
    assert "2.15" in shown
    assert "created 2025-01-02 03:04 UTC" in shown
    assert "data:image/png;base64," in page


def test_what_models_say_before_and_after_cleaning(page: str) -> None:
    shown = _Page(page).text
    assert "from 2 of the 80 prompts of each class" in shown
    assert f"triggered by badnet (size 16) towards “{NASTY}”" in shown
    before, after = (f"▲ {NASTY} 50.0 cat 25.0", f"cat 25.0 ▲ {NASTY} 50.0")
    assert f"mmcl, before cleaning {after} dog 16.7 tree 12.5 house 10.0 {before}" in shown
    assert f"mmcl, cleaned: trial 1, epoch 2 lr 4e-5, epochs 3, weights 1 / 2, weight_decay 0.25 {after}" in shown
    assert page.count('alt="cat: triggered"') == 1


def test_each_front_point_has_its_command_of_export_and_can_be_reached(run: Store, page: str) -> None:
    shown = _Page(page).text
    front = fronts.compute(_epoch_rows(), _trial_rows())
    points = {(r["trial_id"], r["epoch"]) for r in front if r["kind"] == "any_epoch" and r["epoch"]}
    for trial_id, epoch in points:
        assert f"raybd export {run.root} {trial_id}:{epoch}" in shown
    assert page.count('role="button"') == len(points)
    assert page.count('<circle class="pt"') == 2 * 3 * 3
    # Each trial has a line in the front, and one in each panel of its trajectory; settings need no script.
    assert page.count('<g class="trial"') == 6 * 3
    label = "trial 1, cleanclip: lr 4e-5, epochs 3, weights 1 / 2, weight_decay 0.25"
    assert page.count(f"<title>{label}</title>") == 2 * 3
    assert f"raybd run study.yaml --run-dir {run.root}" in shown
    assert f"raybd export {run.root} TRIAL:EPOCH" in shown


def test_points_lie_where_the_figure_has_them() -> None:
    rows = [row for row in _epoch_rows() if row["split"] == "report"]
    front = fronts.compute(_epoch_rows(), _trial_rows())
    figure = figures.front_figure(_epoch_rows(), front, split="report")
    trials = targets.Trials(_trial_rows(), front)
    drawn = targets.on_fronts(figures.svg(figure), figure, rows, trials, prefix="p")
    tree = ET.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    ours = {
        (float(dot.get("cx", "")), float(dot.get("cy", "")))
        for dot in tree.iter(f"{space}circle")
        if dot.get("role") == "button"
    }
    courses = [[dot.get("data-p", "").split("|")[0] for dot in group.iter(f"{space}circle")] for group in tree]
    assert all(course == [str(epoch) for epoch in range(len(course))] for course in courses), "from epoch 0"
    # The markers of fronts, as matplotlib has put them: `use` elements.
    theirs = {(float(use.get("x", "0")), float(use.get("y", "0"))) for use in tree.iter(f"{space}use")}
    assert ours
    for x, y in ours:
        assert min(math.hypot(x - a, y - b) for a, b in theirs) < 0.2


def test_cost_is_summed_by_stage() -> None:
    epochs = [
        {**row, "samples_seen": 100 * row["epoch"], "train_seconds": 2.0 * (row["epoch"] > 0)} for row in _epoch_rows()
    ]
    trials = [{**row, "device_seconds": 40.0} for row in _trial_rows()]
    pretrain = [
        {**row, "train_seconds": 30.0, "evaluate_seconds": 5.0, "samples_seen": 7} for row in _pretrain_rows(BASE)
    ]
    found = spent.stages({"epochs": epochs, "trials": trials, "pretrain_epochs": pretrain})
    assert [entry["stage"] for entry in found] == [
        *("pretraining mmcl", "pretraining mmcl_ssl", "cleaning mmcl", "cleaning mmcl_ssl", "in all")
    ]
    assert found[0] | {"seconds": 140.0, "train_seconds": 120.0, "samples": 7, "epochs": 3} == found[0]
    assert found[2] | {"runs": 5, "epochs": 9, "samples": 900, "seconds": 200.0, "train_seconds": 18.0} == found[2]
    assert found[2]["evaluate_seconds"] is None
    assert found[4]["seconds"] == 2 * 140 + 200 + 120
    assert spent.stages({"epochs": _epoch_rows(), "trials": _trial_rows(), "pretrain_epochs": []}) == []


def test_importance_of_settings_is_in_a_report_of_enough_trials() -> None:
    entry = {"objective": "mmcl", "pretrain_id": "p", "setting": "lr", "trials": 12, "groups": 3}
    entry |= {"zeroshot_top1": {"share": 0.5, "chance": 0.3}, "asr_top1": {"share": 0.1, "chance": 0.25}}
    ((kind, cells),) = grids.importance([entry]).rows
    assert (kind, cells) == ("strong", ("mmcl", "lr", "12", "3", "50.0", "30.0", "10.0", "25.0"))
    drawn = measure_figures.importance_figure([entry])
    assert drawn is not None
    assert [bar.get_width() for axis in drawn.axes for bar in axis.patches] == [50.0, 10.0]


def test_figures_for_print(tmp_path: Path) -> None:
    store, folder = _make(tmp_path / "run", cleaned=False), tmp_path / "new" / "figures"
    done = CliRunner().invoke(app, ["report", store.root, "--figures", str(folder)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["pretraining.pdf", "pretraining.png"]
    with Image.open(folder / "pretraining.png") as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    content = (folder / "pretraining.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"/CreationDate" not in content
    figure = figures.pretrain_figure(_pretrain_rows(BASE))
    with pytest.raises(StorageError, match="cannot be written"):
        drawn.save({"pretraining": figure}, folder / "pretraining.png")
    with pytest.raises(DataError, match="nothing to draw"):
        drawn.save({}, folder)


def test_report_of_several_seeds_shows_what_they_reach(run: Store, tmp_path: Path) -> None:
    other = _make(tmp_path)
    assert "Attainment over 2 runs" in _Page(html.build(run, seeds=[other]).decode()).text
    done = CliRunner().invoke(app, ["report", run.root, run.root])
    assert "given twice" in str(done.exception)


@pytest.mark.skipif(
    not (CHROMIUM and BASH), reason="no Chromium here: what a browser makes of the report is NOT checked"
)
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """Light and dark, wide and on a phone: nothing goes wrong, nothing is asked for, and all that reacts does."""
    shots = Path(SHOTS or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    file = tmp_path / "report.html"
    file.write_text(page)
    with Browser() as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.open(file, width=width, dark=dark)
                assert browser.run("document.documentElement.scrollWidth") <= width
                red, *_ = map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor")))
                assert (red < 128) is dark
                browser.screenshot(shots / f"report-{width}-{'dark' if dark else 'light'}.png")
        # A point on the front: its settings, and the trajectory of its trial, kept by a click.
        dot = "g.trial circle[role=button]"
        line = f"getComputedStyle(document.querySelector('{dot}').parentNode.querySelector('.path')).stroke"
        hidden = browser.run(line)
        browser.point_at(dot)
        assert re.search(r"trial \d, cleanclip: lr .*epoch \d: accuracy [\d.]+ \([\d.–]+\) %, ASR", browser.run(_TIP))
        assert browser.run(line) != hidden
        browser.point_at(dot, click=True)
        browser.point_at("h1")
        assert browser.run(_TIP) == ""
        assert browser.run(line) != hidden
        assert browser.run("document.querySelectorAll('g.trial.chosen').length") == 3
        assert browser.run("document.querySelectorAll('#trial-detail tbody tr').length") == 4
        browser.screenshot(shots / "report-390-dark-chosen.png", whole=False)
        browser.key("Escape")
        assert browser.run("document.querySelectorAll('.chosen').length") == 0
        assert browser.run(line) == hidden
        # By keyboard alone.
        browser.run(f"document.querySelector('{dot}').focus()")
        assert browser.run(_TIP) != ""
        browser.key("Enter")
        assert browser.run("document.querySelectorAll('g.trial.chosen').length") == 3
        # Tables: by ASR, up and down, numbers as numbers and dashes last; the row of a trial chooses it too.
        cells = "[...document.querySelectorAll('#trials tbody tr')].map(row => row.cells[7].textContent)"
        for order in (1, -1):
            browser.point_at("#trials th:last-child button", click=True)
            found = browser.run(cells)
            numbers = [float(cell) for cell in found if cell != "–"]
            assert numbers == sorted(numbers, reverse=order < 0)
            assert found == [cell for cell in found if cell != "–"] + ["–", "–"]
        assert browser.run("document.querySelector('#trials th[aria-sort]').getAttribute('aria-sort')") == "descending"
        browser.key("Escape")
        browser.point_at("#trials tr[data-trial] button", click=True)
        assert browser.run("document.querySelectorAll('#trials tr.chosen').length") == 1
        assert browser.errors == []
        assert browser.requests == []


_TIP = "document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').textContent"


def test_report_is_the_same_every_time_and_lies_in_the_run_directory(run: Store, page: str) -> None:
    path = html.write(run)
    assert path == run.path("report.html")
    assert Path(path).read_text() == page


def test_fronts_not_yet_written_are_computed(tmp_path: Path, run: Store, page: str) -> None:
    store = _make(tmp_path)
    for part in store.names("tables/fronts"):
        store.delete(part)
    again = html.build(store).decode().replace(store.root, run.root)
    start, end = 'id="cleaned"', 'id="figures"'
    assert again[again.index(start) : again.index(end)] == page[page.index(start) : page.index(end)]


def test_report_of_pretraining_alone(tmp_path: Path) -> None:
    shown = _Page(html.build(_make(tmp_path, cleaned=False)).decode())
    assert "No cleaning trial has started yet" in shown.text
    assert "98.95" in shown.text
    assert "svg" in shown.tags


def test_report_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("study.json", json.dumps({"study": {"name": "new"}}).encode())
    assert "No epoch of pretraining has finished yet" in _Page(html.build(store).decode()).text


@pytest.mark.parametrize(
    ("asr", "expected"),
    [
        ((0.99, 0.97), []),
        ((1.00, 0.88), ["on a (100.00 %) than on b (88.00 %)", "succeeds on b in 88.00%"]),
        ((0.94, 0.93), ["succeeds on a in", "succeeds on b in"]),
    ],
)
def test_warnings_about_backdoors_that_differ_or_are_weak(
    tmp_path: Path, asr: tuple[float, float], expected: list[str]
) -> None:
    store = _make(tmp_path, cleaned=False, base={"a": (0.7, asr[0]), "b": (0.7, asr[1])})
    shown = _Page(html.build(store).decode()).text
    assert shown.count("Take care") == len(expected)
    for warning in expected:
        assert warning in shown


def test_a_given_model_without_the_backdoor_is_not_called_badly_attacked(tmp_path: Path) -> None:
    store = _make(tmp_path, cleaned=False)
    course = 'aria-label="Accuracy, attack success rate and loss by epoch of pretraining"'
    assert course in html.build(store).decode()
    rows = [{**row, "asr_top1": 0.01} for row in _pretrain_rows({"suspect": (0.7, 0.9)}) if row["epoch"] == 0]
    tables.write(store, "pretrain_epochs", "p", rows)
    page = html.build(store).decode()
    shown = _Page(page).text
    assert "suspect takes 1.00% of triggered images for the target" in shown
    assert "another trigger or target" in shown
    assert "The attack succeeds" not in shown
    assert course not in page


@pytest.mark.parametrize(
    ("asr", "trained", "seen"),
    [(0.01, False, False), (0.01, True, True), (0.49, False, False), (0.5, False, True), (0.94, False, True)],
)
def test_a_backdoor_that_works_is_not_said_to_be_absent(*, asr: float, trained: bool, seen: bool) -> None:
    sentence = weak_attack("suspect", asr, trained=trained)
    assert f"{asr:.2%}" in sentence
    assert ("The attack succeeds" in sentence) == seen
    assert ("seems to have no backdoor" in sentence) != seen


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"hash": "x"}'])
def test_folder_that_is_no_run_is_refused(tmp_path: Path, content: bytes | None) -> None:
    store = Store(str(tmp_path))
    if content is not None:
        store.put("study.json", content)
    with pytest.raises(DataError, match=r"study\.json|JSON|resolved study"):
        html.build(store)


def test_figures_are_valid_and_the_same_every_time() -> None:
    rows = fronts.compute(_epoch_rows(), _trial_rows())
    for draw in (
        lambda: figures.front_figure(_epoch_rows(), rows, split="search"),
        lambda: figures.trajectory_figure(_epoch_rows(), _trial_rows()),
        lambda: figures.trajectory_figure(_epoch_rows(), []),
        lambda: figures.pretrain_figure(_pretrain_rows(BASE)),
        lambda: figures.front_figure([], []),
        lambda: figures.trajectory_figure([], []),
        lambda: figures.pretrain_figure([]),
    ):
        drawn = figures.svg(draw(), prefix="p")
        assert ET.fromstring(drawn).tag.endswith("svg")
        assert figures.svg(draw(), prefix="p") == drawn
        assert figures.png(draw()).startswith(b"\x89PNG")


def test_front_figure_shows_each_point_of_the_front_on_shared_axes() -> None:
    rows = fronts.compute(_epoch_rows(), _trial_rows())
    left, right = figures.front_figure(_epoch_rows(), rows, split="report").axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_xlim()[0] <= 0
    assert left.get_xlim()[1] >= 100
    for axis, objective in ((left, "mmcl"), (right, "mmcl_ssl")):
        drawn = {(round(x, 6), round(y, 6)) for line in axis.lines for x, y in zip(*line.get_data(), strict=True)}
        for row in rows:
            if row["objective"] == objective and row["split"] == "report":
                assert (round(100 * row["asr_top1"], 6), round(100 * row["zeroshot_top1"], 6)) in drawn


def test_themed_svg_leaves_no_colour_without_a_dark_partner() -> None:
    figure = figures.trajectory_figure(_epoch_rows(), _trial_rows())
    themed = figures.svg(figure, themed=True)
    plain = re.sub(r"var\(--c-[0-9a-f]{6}, #[0-9a-f]{6}\)", "", themed)
    assert themed != plain
    assert re.findall(r"#[0-9a-f]{6}\b", plain) == []


def _analysed(runs: int = 1) -> dict[str, Any]:
    return analysis.analyse([analysis.Run(f"runs/{i}", *_method_rows()) for i in range(runs)])


def test_figures_of_measures_are_valid_and_the_same_every_time() -> None:
    found = _analysed(2)
    run = found["runs"][0]
    for draw in (
        lambda: measure_figures.method_figure(run["fronts"]),
        lambda: measure_figures.instability_figure(run["instability"]),
        lambda: measure_figures.defender_figure(run["defender"], run["fronts"]),
        lambda: measure_figures.difference_figure(found["differences"]),
        lambda: measure_figures.run_figure({"one": run["fronts"], "other": run["fronts"]}),
        lambda: measure_figures.worth_figure(analysis.worths([analysis.Run("one", *_method_rows())], resamples=50)),
        lambda: measure_figures.attainment_figure(found["attainment"]),
    ):
        drawn, again = draw(), draw()
        assert drawn is not None
        assert again is not None
        themed = figures.svg(drawn, themed=True)
        assert ET.fromstring(themed).tag.endswith("svg")
        assert figures.svg(again, themed=True) == themed
        assert re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\(--c-[0-9a-f]{6}, #[0-9a-f]{6}\)", "", themed)) == []


def test_figures_of_measures_show_the_numbers() -> None:
    found = _analysed(2)
    run = found["runs"][0]
    drawn = measure_figures.defender_figure(run["defender"], run["fronts"])
    assert drawn is not None
    (whole,) = [e for e in run["defender"] if (e["objective"], e["method"]) == ("mmcl", "all")]
    score = whole["choices"]["highest_top1"]["scores"]["report"]
    dots = [tuple(map(float, xy)) for line in drawn.axes[0].lines for xy in zip(*line.get_data(), strict=True)]
    assert (100 * score["asr_top1"], 100 * score["zeroshot_top1"]) in dots
    drawn = measure_figures.difference_figure(found["differences"])
    assert drawn is not None
    shown = {float(x) for axis in drawn.axes for line in axis.lines for x in line.get_xdata()}
    for entry in found["differences"]:
        if entry["low"] is not None:
            assert {100 * entry[name] for name in ("difference", "low", "high")} <= shown


def test_where_no_cleaning_keeps_the_accuracy_the_head_says_what_removes_the_attack(tmp_path: Path) -> None:
    def made(name: str, cleaned: tuple[float, float], before: tuple[float, float] = (0.7, 0.99)) -> str:
        epochs = [{**row, **_rates(*(cleaned if row["epoch"] else before))} for row in _epoch_rows()]
        store = _make(tmp_path / name)
        tables.write(store, "epochs", "e", epochs)
        tables.write(store, "fronts", "f", fronts.compute(epochs, _trial_rows()))
        page = html.build(store).decode()
        head = _Page(page[page.index('<ul class="head">') : page.index("<nav")]).text
        return " ".join(head.split())

    assert "best within 1 point" in made("kept", (0.69, 0.5))
    removed = made("removed", (0.5, 0.02))
    assert "2.11 % , not within 1 point of accuracy" in removed
    assert "at accuracy 50.00 %" in removed
    assert "the most accurate with ASR ≤ 5 %" in removed
    assert "ASR stays above 5 %" in made("stays", (0.5, 0.4))
    harmless = made("harmless", (0.5, 0.04), before=(0.7, 0.02))
    assert "2.11 % before cleaning there is no attack to remove" in harmless
    assert "not within" not in harmless


@pytest.mark.parametrize("objectives", [1, 2])
def test_a_legend_lies_within_its_figure(objectives: int) -> None:
    names = list(BASE)[:objectives]
    epochs = [row for row in _epoch_rows() if row["objective"] in names]
    trials = [row for row in _trial_rows() if row["objective"] in names]
    drawn = figures.front_figure(epochs, fronts.compute(epochs, trials))
    drawn.canvas.draw()
    (legend,) = drawn.legends
    around = legend.get_window_extent()
    assert len(legend.get_texts()) == 5
    assert around.x0 >= 0
    assert around.x1 <= drawn.bbox.x1


def test_front_figure_marks_the_batchnorm_baseline() -> None:
    epochs, trials = _method_rows()
    drawn = figures.front_figure(epochs, fronts.compute(epochs, trials), split="report")
    (marked,) = [line for line in drawn.axes[0].lines if line.get_label() == "BatchNorm refresh only"]
    expected = {
        (100 * row["asr_top1"], 100 * row["zeroshot_top1"])
        for row in epochs
        if (row["objective"], row["method"], row["split"]) == ("mmcl", "batchnorm_refresh", "report") and row["epoch"]
    }
    assert {tuple(map(float, xy)) for xy in zip(*marked.get_data(), strict=True)} == expected
    plain = figures.front_figure(_epoch_rows(), fronts.compute(_epoch_rows(), _trial_rows()))
    assert "BatchNorm refresh only" not in [line.get_label() for line in plain.axes[0].lines]


@pytest.mark.parametrize("missing", ["hit_target", "correct_clean", "n_clean"])
def test_intervals_are_drawn_where_all_was_counted(missing: str) -> None:
    def crosses(epochs: Any) -> int:
        drawn = figures.front_figure(epochs, front)
        return sum(bool(lines.get_label().startswith("95 %")) for axis in drawn.axes for lines in axis.collections)

    front = fronts.compute(_epoch_rows(), _trial_rows())
    assert crosses(_epoch_rows()) == 2
    assert crosses([{**row, missing: None} for row in _epoch_rows()]) == 0
    assert crosses(Points.of(_epoch_rows())) == 0, "points have no counts"


def test_an_address_keeps_what_it_is_found_by_and_no_key() -> None:
    def named(query: str) -> str:
        return html._location(Store(f"s3://bucket/run?{query}"))

    place = "endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"
    assert named(place) == f"s3://bucket/run?{place}"
    assert named("scheme=http&region=my-secret") == "s3://bucket/run"


def test_nothing_measured_nothing_drawn() -> None:
    assert measure_figures.method_figure(fronts.summarise(fronts.compute(_epoch_rows(), _trial_rows()))) is None
    assert measure_figures.instability_figure([]) is None
    assert measure_figures.defender_figure([], []) is None
    assert measure_figures.difference_figure([]) is None
    assert measure_figures.run_figure({"one": []}) is None
    assert measure_figures.worth_figure([]) is None
    assert measure_figures.attainment_figure([]) is None


def test_measures_are_in_the_report(page: str) -> None:
    shown = _Page(page).text
    found = analysis.analyse([analysis.Run("run", _epoch_rows(), _trial_rows())])
    assert "Instability over epochs, report half." in shown
    for entry in found["differences"]:
        assert f"{100 * entry['first_value']:.2f} {100 * entry['second_value']:.2f}" in shown
    for choice in ("highest_top1", "last_epoch"):
        point = found["runs"][0]["defender"][0]["choices"][choice]
        score = point["scores"]["report"]
        assert (
            f"{100 * score['zeroshot_top1']:.2f} {100 * score['asr_top1']:.2f} {100 * score['regret_asr']:.2f}" in shown
        )
    assert "BatchNorm statistics refreshed" not in shown


def test_report_of_several_methods_shows_their_front_and_the_baseline(tmp_path: Path) -> None:
    store, (epochs, trials) = Store(str(tmp_path)), _method_rows()
    tables.write(store, "epochs", "e", epochs)
    tables.write(store, "trials", "t", trials)
    store.put("study.json", json.dumps({"study": {"name": "methods"}}).encode())
    shown = _Page(html.build(store).decode()).text
    assert "mmcl cleaned by any method" in shown
    assert "mmcl cleaned by par" not in shown
    assert "Cleaning methods: chosen on the search half" in shown
    assert "Baseline, BatchNorm statistics refreshed and nothing trained" in shown
    assert "par, lr 4e-5" in shown


def test_report_of_imported_results_says_what_is_not_known(tmp_path: Path) -> None:
    """No plan, no pretraining, no picture, one half, and trials of which only the learning rate is known."""
    store = Store(str(tmp_path))
    unknown = {"robust_top1": None, "correct_triggered": None, "broken": None}
    whole = [{**row, **unknown, "split": "all"} for row in _epoch_rows() if row["split"] == "search"]
    known = ("study", "study_hash", "trial_id", "objective", "pretrain_id", "method", "state", "lr")
    trials = [_row("trials", **{name: row[name] for name in known}) for row in _trial_rows() if row["number"] < 3]
    tables.write(store, "epochs", "e", whole)
    tables.write(store, "trials", "t", trials)
    record = {"source": {"name": "<sweep>.csv"}, "only": {"loss": "a b"}, "baseline": {"name": "base.csv"}}
    store.put("study.json", json.dumps({"study": {"name": "imported"}, **record}).encode())
    page = html.build(store).decode()
    shown = _Page(page).text
    assert "imported from <sweep>.csv : only what it holds is known" in shown
    assert "How the training pairs were poisoned is not known" in shown
    assert "How the poisoned models were pretrained is not known" in shown
    assert "chosen and quoted on the same images, all of them" in shown
    assert "report half" not in shown
    assert "search half" not in shown
    assert "lr 4e-5" in shown
    assert "None" not in shown
    assert f"raybd data import-sweep FILE {tmp_path} --only 'loss=a b' --baseline base.csv" in shown
    assert 'aria-label="Accuracy against attack success rate"' in page
    # The same points of a replay.
    replayed = {"study": {"name": "replayed"}, "kind": "replay", "on": {"path": "elsewhere", "nearest": True}}
    store.put("study.json", json.dumps(replayed).encode())
    replayed_shown = _Page(html.build(store).decode()).text
    assert "raybd replay study.yaml --on CURVES --nearest --run-dir runs/again" in replayed_shown
    assert "raybd export" not in replayed_shown, "no weights were kept"
    shown = _pareto(store.root)
    assert "chosen and quoted on the same images, all of them" in " ".join(shown.split())
    assert "half" not in shown
    assert "None" not in shown


def _printed(width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    summaries = fronts.summarise(fronts.compute(_epoch_rows(), _trial_rows()))
    for table in text.front_tables(summaries, _trial_rows()):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_tables_fit_and_have_the_numbers() -> None:
    shown = _printed()
    assert "…" not in shown
    assert shown.count("hypervolume:") == len(BASE)
    assert "mmcl_ssl cleaned by cleanclip: front of all epochs" in shown
    for summary in fronts.summarise(fronts.compute(_epoch_rows(), _trial_rows())):
        if summary["kind"] == "any_epoch":
            assert f"{summary['hypervolume']:.4f}" in shown
            assert f"{100 * summary['baseline']['asr_top1']:.2f}" in shown
            for point in summary["front"]:
                assert f"{100 * point['zeroshot_top1']:.2f}" in shown
    assert re.search(r"\b2\s+3 of 3\s+1\.6e-4\s+1 / 2", shown)
    assert re.search(r"ASR at ≤ 1 point lost +\d +\d( +\d+\.\d\d){4} +-?\d+\.\d", shown)
    assert "accuracy at ASR ≤ 10 %" in shown


def test_json_and_csv_have_fractions() -> None:
    rows = fronts.compute(_epoch_rows(), _trial_rows())
    summaries = fronts.summarise(rows)
    assert json.loads(text.as_json(summaries)) == summaries
    summaries[0]["baseline"]["asr_top1"] = float("nan")
    assert json.loads(text.as_json(summaries))[0]["baseline"]["asr_top1"] is None
    read = list(csv.DictReader(io.StringIO(text.as_csv({"runs/a": rows, "runs/b": rows}))))
    assert [row["run"] for row in read] == ["runs/a"] * len(rows) + ["runs/b"] * len(rows)
    read = read[: len(rows)]
    assert list(read[0])[1:] == tables.SCHEMAS["fronts"].names
    assert [float(row["asr_top1"]) for row in read] == [row["asr_top1"] for row in rows]


def _pareto(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["pareto", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_pareto_prints_every_measure_in_100_columns(run: Store) -> None:
    shown = _pareto(run.root)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    for title in (
        "instability over epochs",
        "taken without knowing the trigger",
        "differences between pretrain objectives",
    ):
        assert shown.count(title) == 1
    assert "attainment" not in shown
    assert "BatchNorm" not in shown
    found = json.loads(_pareto(run.root, "-f", "json"))
    assert set(found) == {"runs", "differences", "attainment"}
    assert set(found["runs"][0]) == {"run", "fronts", "instability", "defender", "batchnorm_refresh"}
    for entry in found["differences"]:
        assert f"{100 * entry['difference']:.2f}" in shown
    for entry in found["runs"][0]["instability"]:
        assert f"{100 * entry['rebound']:.1f}" in shown


METHODS = {0: "cleanclip", 1: "par", 2: "batchnorm_refresh"}


def _method_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Epochs and trials in which each trial has another method."""
    epochs = [{**row, "method": METHODS[int(row["trial_id"][-1])]} for row in _epoch_rows()]
    trials = [{**row, "method": METHODS[row["number"]]} for row in _trial_rows() if row["number"] < 3]
    return epochs, trials


def test_pareto_of_several_runs_and_methods(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = Store(str(tmp_path / name))
        epochs, trials = _method_rows()
        tables.write(store, "epochs", "e", epochs)
        tables.write(store, "trials", "t", trials)
        store.put("study.json", b"{}")
    shown = _pareto(str(tmp_path / "a"), str(tmp_path / "b"))
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.count("cleaning methods: chosen on the search half") == 2
    assert shown.count("mmcl_ssl cleaned by any method: front of all epochs") == 2
    assert "cleaned by par: front" not in shown  # one table for each model; each method has a row
    assert shown.count("baseline, BatchNorm statistics refreshed") == 2
    assert "attainment over 2 runs" in shown
    assert re.search(r"trial +method +epoch", shown)
    assert "2 runs and their trials drawn anew" in " ".join(shown.split())
    rows = list(csv.DictReader(io.StringIO(_pareto(str(tmp_path / "a"), str(tmp_path / "b"), "-f", "csv"))))
    assert {row["run"] for row in rows} == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert {row["method"] for row in rows} == {"all", *METHODS.values()}
    done = CliRunner().invoke(app, ["pareto", str(tmp_path / "a"), str(tmp_path / "a")])
    assert isinstance(done.exception, RaybdError)
    assert "given twice" in str(done.exception)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e-4, "1e-4"), (1.584e-5, "1.58e-5"), (0.1, "0.1"), (2.0, "2"), (20, "20"), (None, "–"), (float("nan"), "–")],
)
def test_numbers_as_a_reader_would_write_them(value: float | None, shown: str) -> None:
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # scipy 1.17.1: binomtest(successes, n).proportion_ci(0.95, "wilson")
    [(15, 20, 0.5312992, 0.8881380), (1, 10, 0.0178762, 0.4041500)],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert metrics.wilson(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_at_the_ends() -> None:
    # With none of n the upper end is z² / (n + z²).
    assert metrics.wilson(0, 10) == (0.0, pytest.approx(metrics.Z_95**2 / (10 + metrics.Z_95**2)))
    assert metrics.wilson(10, 10) == (pytest.approx(10 / (10 + metrics.Z_95**2)), 1.0)
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 of 10"):
        metrics.wilson(11, 10)


def test_reports_need_neither_torch_nor_ray() -> None:
    code = "import sys, raybd.report.html, raybd.report.text; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""A report and notebooks of tables whose texts are HTML: they show them as text, run nothing and ask for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from raybd import fronts, importance, tables
from raybd.errors import DataError
from raybd.report import figures, html, text, words
from raybd.store import Store
from tests.browser import CHROMIUM, QUIET

OURS = (Path(html.__file__).parent / "report.js").read_text(encoding="utf-8")
# What an attacker would try, `@` stands for a server that counts who asks it.
ATTACKS = (
    "<script>document.documentElement.dataset.owned='1';document.title='owned'</script>",
    "<img src='@/image' onerror=\"document.documentElement.dataset.owned='2'\">",
    "\"'><svg onload=document.documentElement.dataset.owned='3'><image href='@/svg'/></svg>",
    "</title></style></textarea></pre><link rel=stylesheet href='@/style'><iframe src='@/frame'></iframe>",
    "<meta http-equiv=refresh content='0;url=@/refresh'><base href='@/'>",
    "{{ 7 * 7 }}{% raw %}<style>@import '@/import';body{background:url(@/background)}</style>",
    "&lt;script&gt; $\\frac{1}{0$ ]]> --> <!-- `![x](@/markdown)` [y](javascript:1) | **b**",
)
LEFT, RIGHT = "\u202e", "\x1b]0;owned\x07"


class Texts(HTMLParser):
    """The tags, event handlers, addresses, scripts and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self._words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            self.scripts += [data] if data.strip() else []
        elif self.tags[-1:] != ["style"]:
            self._words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self._words).split())


def row(table: str, **values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(tables.SCHEMAS[table].names), **values}


def rates(top1: float, asr: float) -> dict[str, Any]:
    counts = {"n_clean": 100, "n_triggered": 100, "correct_clean": round(100 * top1), "hit_target": round(100 * asr)}
    return {"zeroshot_top1": top1, "asr_top1": asr, "robust_top1": 0.0, "correct_triggered": 0, "broken": 1, **counts}


def nasty_run(folder: Path, server: str) -> tuple[Store, list[str]]:
    """Make a run directory with attacks in every text that tables and records have; return it and the texts."""
    attacks = [attack.replace("@", server) for attack in ATTACKS]
    texts = iter(attacks * 20)
    used: list[str] = []

    def text_of(what: str) -> str:
        used.append(f"{what} {next(texts)} {LEFT}{RIGHT}")
        return used[-1]

    store = Store(str(folder))
    epochs, trials = [], []
    for number in range(2):
        whose = {"study": text_of("study"), "study_hash": text_of("hash"), "pretrain_id": text_of("pretrain_id")}
        whose |= {"objective": text_of("objective")}
        mine = {**whose, "method": text_of("method"), "trial_id": text_of("trial_id")}
        pretrained = {"epoch": 1, "poisoned_seen": 3, "loss": 1.0, **rates(0.7, 0.99)}
        tables.write(store, "pretrain_epochs", f"{number}", [row("pretrain_epochs", **whose, **pretrained)])
        params = {text_of("param"): text_of("value"), "lr": 1e-3}
        known = {"lr": 1e-3, "epochs_planned": 1, "epochs_done": 1, "params_json": json.dumps(params)}
        failed = {"error_type": text_of("error_type"), "error_message": text_of("error_message")}
        failed |= {"stop_reason": text_of("stop_reason"), "node": text_of("node"), "device": text_of("device")}
        trials.append(row("trials", **mine, **known, **failed, state=("complete", "failed")[number]))
        for epoch in range(2):
            for split in ("search", "report"):
                epochs.append(
                    row("epochs", **mine, epoch=epoch, split=split, **rates(0.7 - epoch / 50, 0.99 - epoch / 2))
                )
    tables.write(store, "epochs", "e", epochs)
    tables.write(store, "trials", "t", trials)
    tables.write(store, "fronts", "f", fronts.compute(epochs, trials))
    trigger = json.dumps({"name": text_of("trigger"), text_of("setting"): 1})
    captions = {"caption_before": text_of("before"), "caption_after": text_of("after"), "shard": text_of("shard")}
    plan = row("poison_plan", key=text_of("key"), trigger=trigger, target_class=text_of("target"), **captions)
    tables.write(store, "poison_plan", "plan", [plan, {**plan, "target_class": text_of("other target")}])
    tried = {**whose, "epoch": 1, "role": text_of("role"), "trigger": trigger, "target_class": text_of("class")}
    counts = {"n_triggered": 10, "hit_target": 5, "correct_triggered": 0, "asr_top1": 0.5, "robust_top1": 0.0}
    tables.write(store, "attacks", "a", [row("attacks", split="report", **tried, **counts)])
    settings = {text_of("key of a setting"): {"inner": [text_of("setting in a list")]}}
    poison = {"target_class": text_of("class of the record"), "trigger": {"name": text_of("trigger of the record")}}
    record = {
        "study": {"name": text_of("name"), "poison": poison, **settings},
        "hash": text_of("hash of the record"),
        "created": text_of("created"),
        "environment": {"python": text_of("python"), "packages": {text_of("package"): text_of("version")}},
    }
    store.put("study.json", json.dumps(record).encode())
    store.put("skipped.json", json.dumps([{"shard": "s", "key": "k", "reason": text_of("reason")}]).encode())
    store.put("preview.png", b"<svg onload=alert(1)>")
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    pictures = {"clean": picture, "change": picture, "triggered": picture, "key": "k"}
    image = {
        **pictures,
        "label": text_of("label"),
        "target_class": text_of("hit"),
        "trigger": text_of("text of trigger"),
    }
    guess = [{"name": text_of("guess"), "share": 0.5}]
    model = {"objective": text_of("model"), "pretrain_id": "p", "trial_id": text_of("example"), "epoch": 1}
    model |= {"clean": [guess], "triggered": [guess]}
    read = {"templates": 1, "of_templates": 2, "images": [image], "models": [model]}
    store.put("examples.json", json.dumps(read).encode())
    return store, used


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, asked: tuple[str, list[str]]) -> tuple[Store, list[str], str]:
    store, used = nasty_run(tmp_path_factory.mktemp("nasty") / "run", asked[0])
    return store, used, html.build(store).decode()


def shown(used: str) -> str:
    """Return how a text of `nasty_run` stands on a page: what cannot be seen is escaped."""
    return " ".join(used.replace(LEFT, "\\u202e").replace(RIGHT, "\\x1b]0;owned\\x07").split())


# Not for readers: what ties rows together, or is only for machines.
HIDDEN = ("hash ", "study ", "node ", "device ", "shard ", "reason ")


def test_a_report_shows_attacks_as_text(made: tuple[Store, list[str], str]) -> None:
    _, used, page = made
    found = Texts(page)
    assert not {"iframe", "link", "base", "object", "embed", "form"} & set(found.tags)
    assert found.tags.count("script") == 1
    assert found.scripts == [OURS]
    # One of the page, the others of points in figures.
    assert page.partition("</head>")[0].count("<title") == 1
    assert found.tags.count("title") == 1 + page.count('<g class="trial"')
    assert found.tags.count("style") == 1 + found.tags.count("svg")
    assert found.handlers == []
    assert [load for load in found.loads if not load.startswith(("#", "data:image/png;base64,"))] == []
    assert not set(page) & {"\x1b", "\x07", LEFT}
    missing = [text for text in used if not text.startswith(HIDDEN) and shown(text) not in found.text]
    assert missing == []


def test_settings_of_any_name_and_size_are_judged(tmp_path: Path) -> None:
    """Half of a surrogate pair as a name, integers that no float holds: the page is written, and shows the name."""
    same = {"objective": "mmcl", "pretrain_id": "p", "method": "par"}
    epochs, trials = [], []
    for number in range(8):
        mine = {**same, "trial_id": f"t{number}"}
        params = json.dumps({"\ud800": number % 2, "huge": 10**400 + number})
        trials.append(row("trials", **mine, number=number, state="complete", params_json=params))
        for epoch in range(2):
            scores = rates(0.7 - epoch * number / 100, 0.9 - epoch * number / 10)
            epochs.append(row("epochs", **mine, epoch=epoch, split="all", **scores))
    store = Store(str(tmp_path))
    tables.write(store, "epochs", "e", epochs)
    tables.write(store, "trials", "t", trials)
    store.put("study.json", b'{"study": {"name": "hostile"}}')
    assert [entry["setting"] for entry in importance.of_run(epochs, trials)] == ["\ud800"]
    assert "\\ud800 0" in Texts(html.build(store).decode()).text


@pytest.mark.parametrize("params", ["[1]", '"lr"', "1", "null", "{", "[" * 100_000, '{"lr": ' + "9" * 5000 + "}"])
def test_searched_settings_that_are_no_object_are_refused_by_trial(params: str) -> None:
    """Of rows that no reader of tables has checked: those of a run directory are refused before."""
    same = {"objective": "o", "pretrain_id": "p", "method": "m"}
    trials = [row("trials", **same, trial_id=f"t{number}", params_json=params) for number in range(8)]
    epochs = [row("epochs", **same, trial_id=f"t{n}", split="all", epoch=1, **rates(0.7, 0.9)) for n in range(8)]
    for use in (words.other_params, words.settings, lambda trial: importance.of_run(epochs, [trial, *trials[1:]])):
        with pytest.raises(DataError, match="params_json is") as caught:
            use(trials[0])
        assert (caught.value.where, caught.value.expected) == ("trial t0", "a JSON object")


@pytest.mark.parametrize("skipped", [b"[1]", b"{", b'[{"reason": 1}]', b"[" * 100_000])
def test_a_list_of_skipped_samples_that_is_none_is_refused_by_name(skipped: bytes, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("study.json", b'{"study": {"name": "hostile"}}')
    store.put("skipped.json", skipped)
    with pytest.raises(DataError, match="not the records of a run") as caught:
        html.build(store)
    assert caught.value.where.endswith("skipped.json")


def test_other_scripts_and_requests_are_forbidden_by_the_page_itself(made: tuple[Store, list[str], str]) -> None:
    head = made[2].partition("<title>")[0]
    ours = base64.b64encode(hashlib.sha256(OURS.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{ours}'; " in head
    assert "; base-uri 'none'; form-action 'none'\"" in head
    assert head.count("Content-Security-Policy") == head.count("script-src") == 1


def test_our_script_puts_texts_into_the_page_as_texts_only() -> None:
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval",
        "Function(",
        "http",
        "</",
        "import",
    ):
        assert way not in OURS


def dom_of(page: str, folder: Path) -> str:
    """Return the document that Chromium makes of a page, some seconds of its time later."""
    assert CHROMIUM
    folder.mkdir()
    (folder / "page.html").write_text(page)
    command = [CHROMIUM, *QUIET]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    command.append((folder / "page.html").as_uri())
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: what a browser does with the report is NOT checked")
def test_in_a_browser_no_other_script_runs_and_nothing_is_asked_for(
    made: tuple[Store, list[str], str], asked: tuple[str, list[str]], tmp_path: Path
) -> None:
    """Without the page's own policy, so that it is the escaping that is tried; the same texts unescaped do it all."""
    _, used, page = made
    start, end = page.index("<meta http-equiv="), page.index("<meta name=")
    unguarded = page[:start] + page[end:]
    dom = dom_of(unguarded, tmp_path / "report")
    assert asked[1] == []
    found = Texts(dom)
    assert "data-owned" not in dom.partition("<head")[0]
    assert "<title>name " in dom
    assert not {"iframe", "link", "base"} & set(found.tags)
    assert found.scripts == [OURS]
    assert 'class="tip"' in dom  # and it ran
    assert all(shown(text) in found.text for text in used if not text.startswith(HIDDEN))

    attacks = [attack.replace("@", asked[0]) for attack in ATTACKS[:4]]
    raw = f"<!DOCTYPE html><html><head><title>name</title></head><body>{' '.join(attacks)}</body></html>"
    assert "<html data-owned=" in dom_of(raw, tmp_path / "raw")
    assert {"/image", "/svg", "/style", "/frame"} <= set(asked[1])
    asked[1].clear()
    policy = page[start:end]
    guarded = dom_of(raw.replace("<title>", f"{policy}<title>"), tmp_path / "guarded")
    assert "<html data-owned=" not in guarded
    assert asked[1] == []


def test_a_table_of_a_notebook_shows_attacks_as_text() -> None:
    """Markdown lets HTML through, and a picture in it is a request."""
    cells = [f"<b>{attack}</b>\n\n# {attack}" for attack in ATTACKS]
    made = (
        MarkdownIt("commonmark").enable("table").render(text.as_markdown(["a", "b"], [(cell, "1.5") for cell in cells]))
    )
    found = Texts(made)
    assert set(found.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert found.loads == []
    for cell in cells:
        assert " ".join(cell.split()) in found.text


def test_figures_draw_any_name() -> None:
    """Neither formulas that are none, nor letters that the font has not, nor a name of a megabyte."""
    for name in ("$\\frac{1}{0$", "\u65e5\u672c \U0001f600", "x" * 1_000_000, "", "\n" * 100):
        whose = {"objective": name, "pretrain_id": name, "trial_id": name, "method": name}
        rows = [row("epochs", **whose, split="all", epoch=epoch, **rates(0.7, 0.9 - epoch / 2)) for epoch in range(2)]
        fronts_ = fronts.compute(rows, [])
        assert len(figures.svg(figures.front_figure(rows, fronts_, split="all"))) < 1_000_000

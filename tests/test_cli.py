"""The command line: what it imports, what it offers, how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from raybd import checkpoint, cli_complete, model, provenance, study_file, tables
from raybd.cli import app
from raybd.console import View
from raybd.errors import CheckpointError, DataError, RaybdError, StudyError
from raybd.ledger import Kind, Ledger
from raybd.stages import Run
from raybd.store import Store
from raybd.train.inputs import Inputs

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
runner = CliRunner()

DRY_RUN = {"--dry-run", "--tflops", "--no-probe", "--cluster", "--price", "--format", "-f"}
OPTIONS = {
    "demo": {"--run-dir"},
    "run": {"--set", "--run-dir", "--address", "--detach", "--allow-code-change", *DRY_RUN},
    "pretrain": {"--set", "--run-dir", "--address", "--allow-code-change", *DRY_RUN},
    "studies": {"--format", "-f"},
    "schema": set(),
    "doctor": {"--format", "-f"},
    "init": {"--data", "--model", "--start", "--target-class", "--force"},
    "replay": {"--on", "--nearest", "--set", "--run-dir", "--address"},
    "poison": {"--set", "--run-dir", "--preview"},
    "validate": {"--study", "--set"},
    "pareto": {"--format", "-f", "--kind"},
    "evaluate": {
        "--data",
        "--test",
        "--classes",
        "--templates",
        "--target-class",
        "--retrieval",
        "--point",
        "--study",
        "--model",
        "--format",
        "-f",
    },
    "report": {"--figures"},
    "export": {"--out", "--force"},
    "status": {"--watch"},
    "logs": set(),
    "stop": {"--wait"},
    "dashboard": {"--port", "--host", "--every"},
    "data import folder": {"--caption-template", "--test-share", "--seed"},
    "data import csv": {"--image-column", "--caption-column", "--label-column", "--root", "--test-share", "--seed"},
    "data import-sweep": {"--only", "--baseline"},
    "data import cifar10": {"--root", "--download", "--no-download", "--caption-template"},
}


def commands(group: typer.core.TyperGroup, prefix: str = "") -> dict[str, set[str]]:
    """Return the options of every command below a group."""
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
            found[prefix + name] = flags - {"--help"}
    return found


def test_the_commands_and_options_are_those_that_users_know() -> None:
    assert commands(typer.main.get_command(app)) == OPTIONS


def loaded_by(*calls: list[str]) -> list[set[str]]:
    """Call the command line once and again in a process of its own; return what modules were loaded after each call."""
    code = (
        "import sys, json, contextlib, io\n"
        "from raybd.cli import main\n"
        f"for arguments in {calls!r}:\n"
        "    sys.argv = ['raybd', *arguments]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_light_commands_load_neither_torch_nor_ray() -> None:
    calls = (
        ["evaluate", "--help"],
        ["validate", "--help"],
        ["validate", str(TINY)],
        ["status", "."],
        ["studies"],
        ["schema"],
    )
    loaded = loaded_by(*calls)
    assert len(loaded) == len(calls)
    for call, modules in zip(calls, loaded, strict=True):
        assert not modules & {"torch", "ray", "optuna", "open_clip", "torchvision"}, call
    assert {"yaml", "pydantic"} <= loaded[-1], "they did what they are for"


def test_help_loads_what_it_shows_and_no_more() -> None:
    calls = [], ["--help"], ["pareto", "--help"], ["data", "import", "--help"]
    for call, modules in zip(calls, loaded_by(*calls), strict=True):
        assert not modules & {"yaml", "rich", "numpy", "pyarrow", "torch", "ray", "pydantic"}, call


def completions(words: str, *, shell: str = "bash") -> tuple[list[str], set[str]]:
    """Return what a shell is offered at the end of a line, as its script asks for it, and the modules loaded for it."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_TYPER_COMPLETE_ARGS": words}
    code = (
        "import atexit, json, sys\n"
        "sys.argv = ['raybd']\n"
        "atexit.register(lambda: print(json.dumps([n for n in sys.modules if '.' not in n]), file=sys.stderr))\n"
        "from raybd.cli import main\n"
        "main()"
    )
    environment = {**os.environ, "_RAYBD_COMPLETE": f"complete_{shell}", **asked}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    return done.stdout.split("\n"), set(json.loads(done.stderr))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_are_offered_commands_and_studies_and_load_nothing_heavy(shell: str) -> None:
    commands, _ = completions("raybd pre", shell=shell)
    assert ["pretrain" in line for line in commands if line] == [True]
    studies, loaded = completions("raybd run small/", shell=shell)
    assert sum("small/" in line for line in studies) == sum(name.startswith("small/") for name in study_file.shipped())
    assert not loaded & {"torch", "ray", "optuna", "open_clip", "pyarrow", "numpy"}


def test_tab_offers_runs_study_files_and_what_a_lone_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_complete.runs("") == []
    for name in ("runs/mine", "runs/more/deep", "runs/other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/mine", "runs/more/deep"):
        (tmp_path / name / "study.json").touch()
    (tmp_path / "cluster.yaml").touch()
    (tmp_path / "deep.yaml").touch()
    (tmp_path / "notes.txt").touch()
    assert cli_complete.runs("") == ["runs/mine", "runs/more/", "runs/other/"]
    assert cli_complete.runs("runs/mo") == ["runs/more/deep"]
    assert cli_complete.files("") == ["cluster.yaml", "deep.yaml", "runs/"]
    assert cli_complete.studies("de") == ["demo", "deep.yaml"]
    assert cli_complete.studies(f"{tmp_path}/d") == [f"{tmp_path}/deep.yaml"]
    assert cli_complete.runs("nowhere/x") == []


def test_help_shows_the_sentence_of_every_command_whole() -> None:
    for arguments in (["--help"], ["data", "--help"], ["data", "import", "--help"]):
        shown = runner.invoke(app, arguments, env={"COLUMNS": "60"}).output
        assert "..." not in shown.partition("Commands:")[2]
    whole = " ".join(runner.invoke(app, ["--help"]).output.split())
    assert "studies List the studies that come along, each with the first line of its file." in whole


def test_pareto_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("study.json", b"{}")
    now = datetime.now(UTC)
    same = {"study": "s", "study_hash": "h", "pretrain_id": "p", "method": "cleanclip"}
    counts = {"n_clean": 10, "correct_clean": 5, "n_triggered": 10, "hit_target": 1, "correct_triggered": 4}
    rates = {"zeroshot_top1": 0.5, "asr_top1": 0.1, "robust_top1": 0.4}
    for objective in ("mmcl", "mmcl_ssl"):
        mine = {**same, "objective": objective, "trial_id": f"t-{objective}"}
        trial = {"number": 0, "state": "complete", "started": now, "ended": now, "params_json": "{}"}
        tables.write(store, "trials", objective, [{**mine, **trial, "seed": 1, "attempt": 1, "epochs_done": 1}])
        scored = [{**mine, "epoch": epoch, "step": 1, "samples_seen": 9, **rates, **counts} for epoch in (0, 1)]
        rows = [{**row, "split": split} for row in scored for split in ("search", "report")]
        tables.write(store, "epochs", objective, rows)
    (loaded,) = loaded_by(["pareto", str(tmp_path)])
    assert {"pyarrow", "rich", "numpy.random"} <= loaded
    assert not loaded & {"torch", "ray", "optuna", "open_clip", "matplotlib", "pandas"}
    # Each of these takes as long to load as the tables of a small run take to read.
    assert not loaded & {"pydantic", "pyarrow.compute", "numpy.ma", "rich._emoji_codes"}


def run_raybd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run([sys.executable, "-m", "raybd", *arguments], capture_output=True, text=True, check=False)


def test_an_error_is_printed_without_a_traceback_and_sets_the_exit_code(tmp_path: Path) -> None:
    study = tmp_path / "bad.yaml"
    study.write_text("name: bad\npoison: {target_class: fruit, poison_rate: 2}\n")
    done = run_raybd("validate", str(study))
    assert done.returncode == 2
    assert f"{study}:2: poison.poison_rate" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    done = run_raybd("pareto", str(tmp_path))
    assert done.returncode == 1
    assert "not a run directory" in done.stderr


def test_poison_writes_the_plan_and_a_preview(tmp_path: Path) -> None:
    done = runner.invoke(
        app, ["poison", str(TINY), "--run-dir", str(tmp_path / "run"), "--preview", str(tmp_path / "poison.png")]
    )
    assert done.exit_code == 0, done.output
    assert "26 of 256 training pairs" in done.output
    assert (tmp_path / "run/tables/poison_plan/plan.parquet").is_file()
    with Image.open(tmp_path / "poison.png") as picture:
        assert min(picture.size) > 400


def test_data_import_folder_gives_what_a_study_reads(tmp_path: Path) -> None:
    for name, colour in (("apple", "red"), ("pear", "green")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (40, 32), colour).save(tmp_path / "photos" / name / f"{i}.png")
    out = tmp_path / "shards"
    done = runner.invoke(app, ["data", "import", "folder", str(tmp_path / "photos"), str(out), "--test-share", "0.4"])
    assert done.exit_code == 0, done.output
    assert f"data.root={out}" in done.output
    overrides = [f"data.root={out}", "poison.target_class=pear", "clean.num_samples=10"]
    study = study_file.load(str(TINY), overrides=[*overrides, f"data.cache_dir={tmp_path / 'cache'}"])
    inputs = Inputs(study)
    inputs.check()
    assert inputs.classes == ["apple", "pear"]
    assert len(inputs.train_index) + len(inputs.evaluation_set.images.index) == 60


def refusal(*overrides: str) -> RaybdError:
    """Return the error with which a study is refused before any work."""
    with pytest.raises(RaybdError) as caught:
        Inputs(study_file.load(str(TINY), overrides=list(overrides))).check()
    return caught.value


def test_a_missing_shard_is_named() -> None:
    error = refusal("data.train=train/train-{000000..000009}.tar.gz")
    assert isinstance(error, DataError)
    assert "train-000004.tar.gz" in str(error)
    assert "and 3 more" in str(error)


def test_a_target_class_that_is_not_there_is_answered_with_those_alike() -> None:
    error = refusal("poison.target_class=fruits")
    assert "no class 'fruits'" in str(error)
    assert "fruit" in error.fix


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    path.write_bytes(checkpoint.to_bytes(model.create("vit-tiny-32", seed=0).net.state_dict()))
    error = refusal(f"model.start={path}")
    assert isinstance(error, CheckpointError)
    assert "weights of another model" in str(error)
    assert str(path) in str(error)


def test_a_missing_checkpoint_and_a_cut_one_are_refused(tmp_path: Path) -> None:
    assert "no such checkpoint" in str(refusal(f"model.start={tmp_path / 'none.pt'}"))
    path = tmp_path / "cut.safetensors"
    path.write_bytes(checkpoint.to_bytes({"a": torch.zeros(100)})[:60])
    assert "not a whole safetensors file" in str(refusal(f"model.start={path}"))


def test_an_unknown_model_is_answered_with_those_alike() -> None:
    assert "resnet-tiny-32" in str(refusal("model.name=resnet-tiny"))


def test_a_trigger_larger_than_the_image_is_refused() -> None:
    assert "does not fit the 32x32 image" in str(refusal("poison.trigger.size=33"))


def test_a_cleaning_set_larger_than_the_clean_pairs_is_refused() -> None:
    assert "at most 230" in str(refusal("clean.num_samples=231"))


def test_models_that_are_not_trained_as_clip_are_refused() -> None:
    assert "not a CLIP model with a logit scale" in str(refusal("model.name=coca_ViT-B-32"))


def test_a_run_directory_in_which_nothing_was_trained_takes_another_study(tmp_path: Path) -> None:
    """Looking at the preview, or a mistake in the data, must not lock it."""
    run_dir = str(tmp_path / "run")
    for rate, count in (("0.1", 26), ("0.2", 51)):
        done = runner.invoke(app, ["poison", str(TINY), "--run-dir", run_dir, "--set", f"poison.poison_rate={rate}"])
        assert done.exit_code == 0, done.output
        assert tables.read(Store(run_dir), "poison_plan").num_rows == count
    Ledger(Store(run_dir)).start(Kind.PRETRAIN, "mmcl-1", {})
    done = runner.invoke(app, ["poison", str(TINY), "--run-dir", run_dir])
    assert isinstance(done.exception, StudyError)
    assert "poison.poison_rate: 0.2 → 0.1" in str(done.exception)


def test_a_run_directory_keeps_its_data_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = str(tmp_path / "run")
    command = ["poison", str(TINY), "--run-dir", run_dir]
    assert runner.invoke(app, command).exit_code == 0
    store = Store(run_dir)
    Ledger(store).start(Kind.PRETRAIN, "mmcl-1", {})
    record = json.loads(store.get("study.json"))
    assert set(record["pretrain_ids"]) == {"mmcl", "mmcl_ssl"}
    store.put("study.json", json.dumps({**record, "pretrain_ids": {"mmcl": "x", "mmcl_ssl": "y"}}).encode())
    assert "are not those that this run directory was made with" in str(runner.invoke(app, command).exception)
    store.put("study.json", json.dumps(record).encode())
    monkeypatch.setattr(provenance, "code_version", lambda: "0.2.0+other")
    assert "made by raybd" in str(runner.invoke(app, command).exception)
    study, view = study_file.anchored(study_file.load(str(TINY))), View()
    assert Run(study, store, view, allow_code_change=True).poison() == record["pretrain_ids"]

"""The notebooks in analysis/, each from top to bottom, on runs made here, on a bucket, and on the published sweep."""

from __future__ import annotations

import base64
import csv
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raybd import analysis, fronts, tables
from raybd.store import Store
from raybd.sweeps import import_sweep

ANALYSIS = Path(__file__).resolve().parents[1] / "analysis"
KEEP = os.environ.get("RAYBD_TEST_FIGURES")  # a folder for the figures, for somebody to look at
PUBLISHED = Path(__file__).parents[2] / "shared" / "published" / "cc3m_sweep.csv"


def made_sweep(folder: Path) -> str:
    """Import a small sweep of two pretrain objectives, two losses and two learning rates."""
    names = [
        "pretrain_objective",
        "cleaning_loss",
        "lr",
        "epoch",
        "zeroshot_top1",
        "asr_top1",
        "n_clean",
        "n_triggered",
    ]
    with (folder / "made.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for objective, keep in (("mmcl", 0.4), ("mmcl_ssl", 0.8)):
            for loss, worse in (("mmcl", 0.1), ("mmcl_ssl", 0.0)):
                for i, lr in enumerate((1e-5, 1e-4)):
                    for epoch in range(4):
                        top1 = round(1000 * (0.4 - 0.01 * (i + 1) * epoch)) / 1000
                        asr = round(950 * 0.99 * (keep + worse) ** (epoch * (i + 1) / 2)) / 950
                        writer.writerow((objective, loss, lr, epoch, top1, asr, 1000, 950))
    import_sweep(str(folder / "made.csv"), str(folder / "published"))
    return str(folder / "published")


def made_study(uri: str) -> Store:
    """Write the tables of a study of ours: both halves, one method, three trials for each pretrain objective.

    The ASR of the last trial of each comes back at its end.
    """
    store, epochs, trials, pretrained = Store(uri), [], [], []
    for objective, keep in (("mmcl", 0.3), ("mmcl_ssl", 0.7)):
        same = {"study": "ours", "study_hash": "h", "pretrain_id": f"{objective}-1", "objective": objective}
        for number in range(3):
            trial: dict[str, Any] = {**same, "method": "cleanclip", "trial_id": f"{objective}-{number:04d}"}
            settings = {"lr": 1e-5 * 10**number, "epochs_planned": 3, "epochs_done": 3}
            trials.append({**trial, **settings, "number": number, "state": "complete", "params_json": "{}"})
            for epoch in range(4):
                for split, extra in (("search", 0), ("report", 2)):
                    correct, hit = 70 - epoch * (number + 1) - extra, round(99 * keep ** (epoch * (number + 1) / 2))
                    hit += 9 if (number, epoch) == (2, 3) else 0
                    counts = {"n_clean": 100, "correct_clean": correct, "n_triggered": 100, "hit_target": hit}
                    rates = {"zeroshot_top1": correct / 100, "asr_top1": hit / 100, "loss": 1.0 / (epoch + 1)}
                    epochs.append({**trial, **counts, **rates, "epoch": epoch, "split": split})
        for epoch in range(3):
            rates = {"zeroshot_top1": 0.35 * epoch, "asr_top1": 0.495 * epoch, "loss": 4.0 - epoch}
            pretrained.append({**same, **rates, "epoch": epoch})
    tables.write(store, "epochs", "e", epochs)
    tables.write(store, "trials", "t", trials)
    tables.write(store, "pretrain_epochs", "p", pretrained)
    tables.write(store, "fronts", "f", fronts.compute(epochs, trials))
    store.put("study.json", b'{"study": {"name": "ours"}}')
    return store


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_study(str(tmp_path_factory.mktemp("runs") / "ours")).root


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], str]:
    """Run all cells of a notebook from top to bottom, in this process; return the figures, and all that it printed.

    What a kernel adds, a process and a protocol, takes longer than all the rest; of one notebook it is run too.
    """
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third parties' as they are loaded
        from IPython.core.history import HistoryManager
        from IPython.core.interactiveshell import InteractiveShell
        from IPython.utils.capture import capture_output

        monkeypatch.setattr(HistoryManager, "enabled", False)
        shell = InteractiveShell.instance()
    pictures, printed = list[bytes](), list[str]()
    try:
        for cell in notebook(name).cells:
            if cell.cell_type == "code":
                with capture_output() as shown:
                    result = shell.run_cell(cell.source, store_history=False)
                result.raise_error()
                data = [output.data for output in shown.outputs]
                pictures += [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]
                printed += [shown.stdout, *(found.get("text/markdown", found.get("text/plain", "")) for found in data)]
    finally:
        InteractiveShell.clear_instance()
    if KEEP:
        for number, picture in enumerate(pictures):
            (Path(KEEP) / f"{name}-{number}.png").write_bytes(picture)
    return pictures, "\n".join(printed)


def notebook(name: str) -> Any:
    """Return a notebook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nbformat

        return nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", sorted(path.stem for path in ANALYSIS.glob("*.ipynb")))
def test_notebooks_have_their_parameters_first_and_no_outputs(name: str) -> None:
    cells = notebook(name).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("# ")
    # Papermill's convention: it puts what it is given after this cell.
    assert [cell.metadata.get("tags") for cell in code] == [["parameters"], *[None] * (len(code) - 1)]
    assert "raybd" not in code[0].source
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_fronts_of_a_run(ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYBD_RUN", ours)
    pictures, printed = executed("pareto", tmp_path, monkeypatch)
    assert len(pictures) == 3  # pretraining, fronts, differences
    assert "'epochs': 48, 'trials': 6, 'pretrain_epochs': 6" in printed
    for found in analysis.of_run(analysis.Run.read(ours))["fronts"]:
        assert f"{found['split']:7} {found['hypervolume']:.4f}" in printed
    assert "differences between pretrain objectives" in printed


def test_several_runs_side_by_side(sweep: str, ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYBD_RUN", f"{ours},{sweep}")
    pictures, printed = executed("compare", tmp_path, monkeypatch)
    assert len(pictures) == 3  # fronts, what they are worth, differences
    assert "{'ours': '6 trials', 'published': '8 trials'}" in printed
    runs = [analysis.Run.read(ours, name="ours"), analysis.Run.read(sweep, name="published")]
    for entry in analysis.worths(runs):
        if entry["measure"] == "hypervolume_share":
            low, high = (f"{100 * entry[bound]:.1f}" for bound in ("low", "high"))
            assert f"| {100 * entry['value']:.1f} | {low} to {high} | {entry['trials']} |" in printed


def test_how_trials_go(ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYBD_RUN", ours)
    pictures, printed = executed("trajectories", tmp_path, monkeypatch)
    assert len(pictures) == 4  # trajectories, of all and of the worst, stability, blind choices
    # Of the last trials alone ASR comes back; a step is unstable where accuracy falls at the same time.
    assert "| mmcl-0002 | 3 | 1 |" in printed
    assert "| mmcl\\_ssl-0002 |" not in printed
    assert "taken without knowing the trigger" in printed
    (choice, _) = analysis.of_run(analysis.Run.read(ours))["defender"]
    regret = choice["choices"]["lowest_loss"]["scores"]["report"]["regret_asr"]
    assert f"{100 * regret:.2f}" in printed


def test_duckdb_on_a_bucket(bucket: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made_study("s3://chaos/runs/ours")
    monkeypatch.setenv("RAYBD_RUN", store.uri)
    pictures, printed = executed("bucket", tmp_path, monkeypatch)
    assert len(pictures) == 1
    assert "complete" in printed
    found = fronts.compute(*(tables.read(store, name).to_pylist() for name in ("epochs", "trials")))
    for row in found:
        if (row["kind"], row["split"]) == ("any_epoch", "report"):
            assert f"{row['hypervolume']:.6f}".rstrip("0") in printed
    for secret in bucket.values():
        assert secret not in printed


def test_a_sweep_beside_a_study_in_a_kernel(
    sweep: str, ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Jupyter runs it."""
    monkeypatch.setenv("RAYBD_PUBLISHED", sweep)
    monkeypatch.setenv("RAYBD_OURS", ours)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ANALYSIS.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    published = notebook("published")
    with warnings.catch_warnings():
        # Third parties: zmq and jupyter_client warn of event loops and of paths that they are about to change.
        warnings.simplefilter("ignore")
        from nbclient import NotebookClient

        NotebookClient(published, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in published.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.get("data", {}) for output in outputs]
    printed = [data.get("text/markdown", data.get("text/plain", "")) for data in shown]
    text = "\n".join([*printed, *(output.get("text", "") for output in outputs)])
    # Fronts and trajectories of both, and what else there is enough data for.
    assert sum("image/png" in data for data in shown) >= 4
    assert "'published': '8 trials'" in text
    assert "'ours': '6 trials'" in text
    for run, split, name in ((sweep, "all", "published"), (ours, "report", "ours")):
        for found in analysis.of_run(analysis.Run.read(run))["fronts"]:
            if (found["kind"], found["split"]) == ("any_epoch", split):
                line = f"| {name} | {found['objective']} | {found['method']} | {found['hypervolume']:.4f} |"
                assert line in text


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published sweeps are not part of the repository")
def test_the_published_cc3m_sweep(ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_sweep(str(PUBLISHED), str(tmp_path / "published"))
    monkeypatch.setenv("RAYBD_PUBLISHED", str(tmp_path / "published"))
    monkeypatch.setenv("RAYBD_OURS", ours)
    _, printed = executed("published", tmp_path, monkeypatch)
    assert "| published | mmcl | cleanclip | 0.1742 | 108.92 | 0.25 | 16.49 | -3.11 |" in printed
    assert "| published | mmcl_ssl | cleanclip | 0.1640 |" in printed

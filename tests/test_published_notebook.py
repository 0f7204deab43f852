"""The notebook of published sweeps beside a study of ours, on runs made here and on the published one."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from raybd import fronts, tables
from raybd.store import Store
from raybd.sweeps import import_sweep

NOTEBOOK = Path(__file__).resolve().parents[1] / "analysis" / "published.ipynb"
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


def made_study(folder: Path) -> str:
    """Write the tables of a study of ours: both halves, one method, three trials for each pretrain objective."""
    store, epochs, trials = Store(str(folder / "ours")), [], []
    for objective, keep in (("mmcl", 0.3), ("mmcl_ssl", 0.7)):
        same = {"study": "ours", "study_hash": "h", "pretrain_id": f"{objective}-1", "objective": objective}
        for number in range(3):
            trial: dict[str, Any] = {**same, "method": "cleanclip", "trial_id": f"{objective}-{number:04d}"}
            settings = {"lr": 1e-5 * 10**number, "epochs_planned": 3, "epochs_done": 3}
            trials.append({**trial, **settings, "number": number, "state": "complete", "params_json": "{}"})
            for epoch in range(4):
                for split, extra in (("search", 0), ("report", 2)):
                    correct, hit = 70 - epoch * (number + 1) - extra, round(99 * keep ** (epoch * (number + 1) / 2))
                    counts = {"n_clean": 100, "correct_clean": correct, "n_triggered": 100, "hit_target": hit}
                    rates = {"zeroshot_top1": correct / 100, "asr_top1": hit / 100, "loss": 1.0 / (epoch + 1)}
                    epochs.append({**trial, **counts, **rates, "epoch": epoch, "split": split})
    tables.write(store, "epochs", "e", epochs)
    tables.write(store, "trials", "t", trials)
    store.put("study.json", b'{"study": {"name": "ours"}}')
    return store.root


def execute(published: str, ours: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run the notebook; return how many figures it drew, and all that it printed."""
    with warnings.catch_warnings():
        # Third parties: zmq and jupyter_client warn of event loops and of paths that they are about to change.
        warnings.simplefilter("ignore")
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert 'published = "runs/cc3m-published"\nours = "runs/demo"' in code[0].source
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
        monkeypatch.setenv("RAYBD_PUBLISHED", published)
        monkeypatch.setenv("RAYBD_OURS", ours)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("IPYTHONDIR", str(folder))
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    shown = [output.get("data", {}) for output in outputs]
    printed = [data.get("text/markdown", data.get("text/plain", "")) for data in shown]
    text = "\n".join([*printed, *(output.get("text", "") for output in outputs)])
    return sum("image/png" in data for data in shown), text


def test_notebook_draws_a_sweep_beside_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published, ours = made_sweep(tmp_path), made_study(tmp_path)
    drawn, printed = execute(published, ours, tmp_path, monkeypatch)
    # Fronts and trajectories of both, and what else there is enough data for.
    assert drawn >= 4
    assert "'published': '8 trials'" in printed
    assert "'ours': '6 trials'" in printed
    for run, split, name in ((published, "all", "published"), (ours, "report", "ours")):
        rows = [tables.read(Store(run), table).to_pylist() for table in ("epochs", "trials")]
        for found in fronts.summarise(fronts.compute(*rows)):
            if (found["kind"], found["split"]) == ("any_epoch", split):
                line = f"| {name} | {found['objective']} | {found['method']} | {found['hypervolume']:.4f} |"
                assert line in printed


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published sweeps are not part of the repository")
def test_notebook_draws_the_published_cc3m_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_sweep(str(PUBLISHED), str(tmp_path / "published"))
    _, printed = execute(str(tmp_path / "published"), made_study(tmp_path), tmp_path, monkeypatch)
    assert "| published | mmcl | cleanclip | 0.1742 | 108.92 | 0.25 | 16.49 | -3.11 |" in printed
    assert "| published | mmcl_ssl | cleanclip | 0.1640 |" in printed

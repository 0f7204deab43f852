"""What a study takes on the machines of a cluster file: hours, machine-hours and money."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import config
from typer.testing import CliRunner

from raybd import study_file
from raybd.cli import app
from raybd.cluster import bill, cluster_file
from raybd.errors import ClusterError, StudyError
from raybd.study import Study

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
PRICES = {"head": 0.5, "gpu_spot": 1.0, "gpu4_spot": 3.0}
WORK: dict[str, float | None] = {"pretrain": 8.0, "clean": 20.0}
runner = CliRunner()


def study(workers: int = 4, trials: int = 4, *sets: str) -> Study:
    gpu = ["resources.use_gpu=true", f"resources.num_workers={workers}", f"resources.concurrent_trials={trials}"]
    return study_file.load(str(TINY), overrides=[*gpu, *sets])


def text(prices: Any = None) -> str:
    """Return the AWS file, whose words are not filled in, with prices."""
    found = config("aws")
    if prices is not None:
        found = {**found, "metadata": {**found["metadata"], "prices": prices}}
    return yaml.safe_dump(found, sort_keys=False)


def billed(wanted: Study, prices: Any = None, work: dict[str, float | None] = WORK) -> bill.Bill:
    verdict = cluster_file.parse(text(prices), source="c", study=wanted, filled_in=False)
    assert verdict.share is not None
    return bill.make(verdict.machines, verdict.share, work)


def test_a_study_takes_the_machines_that_cost_least_for_each_gpu() -> None:
    found = billed(study(), PRICES)
    # One machine of four GPUs costs 0.75 a GPU, four of one GPU 1.
    assert [(stage.name, stage.at_once, stage.machines) for stage in found.stages] == [
        ("pretrain", 4, {"gpu4_spot": 1}),
        ("clean", 4, {"gpu4_spot": 1}),
    ]
    assert [stage.hours for stage in found.stages] == [2.0, 5.0]
    assert found.hours == 7.0
    assert found.machine_hours == {"gpu4_spot": 7.0, "head": 7.0}
    assert found.dollars == 7 * 3.0 + 7 * 0.5
    dear = billed(study(), {**PRICES, "gpu4_spot": 5.0})
    assert dear.machine_hours == {"gpu_spot": 4 * 7.0, "head": 7.0}
    assert dear.dollars == 28 + 3.5


def test_no_more_machines_are_counted_than_the_file_allows() -> None:
    found = billed(study(7, 12), PRICES)
    # One of four, and three of one GPU: `max_workers` of the file is 4.
    assert [(stage.at_once, stage.machines) for stage in found.stages] == [(7, {"gpu4_spot": 1, "gpu_spot": 3})] * 2
    assert [stage.hours for stage in found.stages] == [8 / 7, 20 / 7]


def test_trials_that_share_a_gpu_are_no_faster_for_it() -> None:
    found = billed(study(1, 8, "resources.gpus_per_trial=0.25"), {**PRICES, "gpu_spot": 0.5})
    assert [(stage.at_once, stage.machines) for stage in found.stages] == [(1, {"gpu_spot": 1}), (8, {"gpu_spot": 2})]
    assert found.stages[1].hours == 20 / 2


def test_trials_on_cpus_use_the_head_too() -> None:
    found = billed(study(1, 10, "resources.use_gpu=false"), PRICES)
    assert found.stages[0].machines == {}  # the head has eight
    assert (found.stages[1].at_once, sum(found.stages[1].machines.values())) == (10, 1)


def test_without_prices_or_a_speed_what_is_known_is_told() -> None:
    found = billed(study(), {"head": 0.5})
    assert (found.dollars, found.unpriced) == (None, ("gpu4_spot",))
    assert found.machine_hours == {"gpu4_spot": 7.0, "head": 7.0}
    found = billed(study(), PRICES, {"pretrain": None, "clean": None})
    assert (found.hours, found.machine_hours, found.dollars) == (None, None, None)


def test_of_machines_that_are_there_already_nothing_is_known_but_what_the_study_says() -> None:
    verdict = cluster_file.parse(yaml.safe_dump(config("local")), source="c", study=study(2, 4), filled_in=False)
    assert verdict.share is not None
    found = bill.make(verdict.machines, verdict.share, WORK)
    assert [(stage.at_once, stage.hours) for stage in found.stages] == [(2, 4.0), (4, 5.0)]
    assert (found.hours, found.machine_hours, found.dollars) == (9.0, None, None)


def test_a_stage_without_a_place_is_an_error() -> None:
    verdict = cluster_file.parse(text(PRICES), source="c", study=study(), filled_in=False)
    assert verdict.share is not None
    with pytest.raises(ClusterError, match="no machine has room for a trial"):
        bill.make(verdict.machines, replace(verdict.share, cpus_per_trial=99), {"clean": 1.0})


@pytest.mark.parametrize(
    ("prices", "what"),
    [
        ({"gpu_spt": 1.0}, "metadata.prices.gpu_spt: no such node type"),
        ({"head": "cheap"}, "metadata.prices.head: cheap: USD for an hour of a machine"),
        ({"head": -1}, "metadata.prices.head: -1: USD"),
        ({"head": True}, "metadata.prices.head: True: USD"),
        ({"head": float("nan")}, "metadata.prices.head: nan: USD"),
        ([1.0], "metadata.prices: node types, each with the USD"),
    ],
)
def test_prices_that_are_none_are_refused(prices: Any, what: str) -> None:
    with pytest.raises(StudyError) as caught:
        cluster_file.parse(text(prices), source="c", filled_in=False)
    assert what in str(caught.value)


def test_the_command_tells_hours_and_price(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text({"head": 0.5, "gpu4_spot": 3.0}))
    sets = ["resources.use_gpu=true", "resources.num_workers=4", "resources.concurrent_trials=4"]
    command = ["run", str(TINY), "--dry-run", "--tflops", "1e-3", "--cluster", str(file)]
    command += [word for setting in sets for word in ("--set", setting)]
    told = runner.invoke(app, command).output
    assert "4 trials at once on 1 × gpu4_spot" in told
    plan = json.loads(runner.invoke(app, [*command, "-f", "json"]).output)
    hours = plan["bill"]["hours"]
    assert hours == pytest.approx(plan["total"]["device_hours"] / 4)
    assert plan["bill"]["dollars"] == pytest.approx(hours * 3.5)
    assert f"price: ${plan['bill']['dollars']:,.2f}: " in told
    file.write_text(text())
    assert "price: not known: " in runner.invoke(app, command).output
    given = [*command, *(word for name, price in PRICES.items() for word in ("--price", f"{name}={price}"))]
    assert "machine-hours of gpu4_spot at $3, " in runner.invoke(app, given).output


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--price", "head=1"], "of which cluster?"),
        (["--cluster", "nowhere.yaml"], "no such cluster file"),
        (["--cluster", "FILE", "--price", "gpu=1"], "no node type gpu"),
        (["--cluster", "FILE", "--price", "head=much"], "head=much"),
        (["--cluster", "FILE", "--price", "head=nan"], "head=nan"),
    ],
)
def test_mistakes_in_what_is_asked_are_told(tmp_path: Path, options: list[str], what: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text())
    words = [word.replace("FILE", str(file)) for word in options]
    told = runner.invoke(app, ["run", str(TINY), "--dry-run", "--no-probe", *words])
    assert isinstance(told.exception, StudyError)
    assert what in str(told.exception)

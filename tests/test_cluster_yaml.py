"""cluster.yaml: Ray takes it, it installs the Ray that is tested here, and nothing of it is open to the network."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Do what `ray up` does before it speaks to AWS; return the configuration with Ray's defaults."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return dict(prepared)


def test_ray_takes_it(config: dict[str, Any]) -> None:
    prepared = validate(config)
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"]["head"] == 1
    assert "InstanceMarketOptions" not in head["node_config"]
    workers = [kind for name, kind in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    assert [(kind["min_workers"], kind["node_config"]["InstanceMarketOptions"]["MarketType"]) for kind in workers] == [
        (0, "spot")
    ]
    assert sum(kind["max_workers"] for kind in workers) == prepared["max_workers"]


@pytest.mark.parametrize("where", [(), ("available_node_types", "gpu_spot"), ("auth",)])
def test_a_misspelt_key_is_refused(config: dict[str, Any], where: tuple[str, ...]) -> None:
    from jsonschema import ValidationError

    inner = config
    for key in where:
        inner = inner[key]
    inner["idle_timeout_minuts"] = 5
    with pytest.raises(ValidationError, match="idle_timeout_minuts"):
        validate(config)


def test_it_installs_the_ray_that_is_installed_here_and_locked(config: dict[str, Any]) -> None:
    import ray

    commands = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    named = [Requirement(text) for command in commands for text in re.findall(r'"(ray\b[^"]*)"', command)]
    assert [str(found.specifier) for found in named] == [f"=={ray.__version__}"]
    assert named[0].extras == {"default", "train", "tune"}
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert f"ray=={ray.__version__}" in locked
    assert not any("ray-wheels" in command for command in commands), "Ray's default installs a nightly build"


def test_no_command_is_left_to_rays_defaults(config: dict[str, Any]) -> None:
    prepared = validate(config)
    for key in (key for key in prepared if key.endswith("_commands")):
        assert key in config, f"{key} would come from Ray's defaults for AWS"


def test_dashboard_is_local_and_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    starts = {
        kind: [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
        for kind in ("head", "worker")
    }
    for lines in starts.values():
        assert len(lines) == 1
        assert "RAY_AUTH_MODE=token" in lines[0]
    assert "--dashboard-host=127.0.0.1" in starts["head"][0]
    assert "dashboard" not in starts["worker"][0]
    user = config["auth"]["ssh_user"]
    assert config["file_mounts"][f"/home/{user}/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"][f"/home/{user}/raybd"] == "."

"""The cluster files that come along: Ray takes them, they install the Ray that is tested here, and open nothing."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

import pytest
import yaml
from cluster_files import FILES, ROOT
from packaging.requirements import Requirement

from raybd import study_file


@pytest.fixture(params=FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = yaml.safe_load(FILES[request.param].read_text(encoding="utf-8"))
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
    assert set(config) <= set(prepared)
    if config["provider"]["type"] == "local":
        assert prepared["max_workers"] == len(config["provider"]["worker_ips"])
        return
    head, types = prepared["head_node_type"], prepared["available_node_types"]
    assert types[head]["resources"]["head"] == 1
    assert types[head]["max_workers"] == 0
    workers = {name: kind for name, kind in types.items() if name != head}
    assert set(workers) == {"gpu_spot", "gpu4_spot"}
    assert all(kind["min_workers"] == 0 and "head" not in kind["resources"] for kind in workers.values())
    assert workers["gpu_spot"]["max_workers"] == prepared["max_workers"]


def is_spot(node: dict[str, Any]) -> bool:
    market, scheduling = node.get("InstanceMarketOptions", {}), node.get("scheduling", {})
    return "spot" in (market.get("MarketType"), str(scheduling.get("provisioningModel")).lower())


def test_workers_are_spot_machines_and_the_head_is_none(config: dict[str, Any]) -> None:
    for name, kind in config.get("available_node_types", {}).items():
        assert is_spot(kind["node_config"]) is (name != "head")


def test_the_driver_is_pinned_by_a_resource_of_the_head(config: dict[str, Any]) -> None:
    commands = {kind: " ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker")}
    types = config.get("available_node_types", {})
    if not types:
        assert """--resources='{"head": 1}'""" in commands["head"]
        assert "--resources" not in commands["worker"]
    assert [name for name, kind in types.items() if "head" in kind["resources"]] == (["head"] if types else [])


def test_files_of_clusters_are_no_studies() -> None:
    assert not [name for name in study_file.shipped() if name.startswith("cluster")]


@pytest.mark.parametrize("where", [(), ("available_node_types", "gpu_spot"), ("auth",)])
def test_a_misspelt_key_is_refused(config: dict[str, Any], where: tuple[str, ...]) -> None:
    from jsonschema import ValidationError

    inner = config
    if where and where[0] not in config:
        pytest.skip("it has none")
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
        assert key in config, f"{key} would come from Ray's defaults"


def test_a_login_finds_raybd_and_asks_for_the_token(config: dict[str, Any]) -> None:
    (command,) = (found for found in config["setup_commands"] if ".bashrc" in found)
    *_, line, to, file = shlex.split(command)
    assert line == "export PATH=$HOME/venv/bin:$PATH RAY_AUTH_MODE=token  # raybd-env"
    assert (to, file) == (">>", "~/.bashrc")


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
    # Whose home is where is known of a cloud's images alone.
    home = "~" if config["provider"]["type"] == "local" else f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"] == {f"{home}/raybd": ".", f"{home}/.ray/auth_token": "~/.ray/auth_token"}

"""cluster.yaml against AWS as moto plays it: what `ray up` and the autoscaler make and ask for, without ssh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import config

ROLES = {"raybd-head-mine", "raybd-worker-mine"}


class Stopped(Exception):
    """Ray would go on by ssh to the machine."""


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An AWS of this process, with the instance profiles that cluster.yaml names; returns its EC2 client."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    from ray.autoscaler._private.aws import config as rays
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.providers import _clear_provider_cache

    def forget() -> None:
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        rays._get_subnets_or_die.cache_clear()
        _clear_provider_cache()

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key for ssh there
    forget()
    with moto.mock_aws():
        iam = boto3.client("iam", region_name="us-west-2")
        for name in ROLES:
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name="us-west-2")
    forget()


def with_an_image(ec2: Any) -> dict[str, Any]:
    """Return cluster.yaml, filled in with an image that moto knows."""
    found = config("aws")
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for kind in found["available_node_types"].values():
        kind["node_config"]["ImageId"] = image
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What EC2 was asked for, as RunInstances takes it."""
    import botocore.client

    requests: list[dict[str, Any]] = []
    call = botocore.client.BaseClient._make_api_call

    def noted(self: Any, name: str, arguments: dict[str, Any]) -> Any:
        if name == "RunInstances":
            requests.append(arguments)
        return call(self, name, arguments)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", noted)
    return requests


def up(ec2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `ray up` does until the head was asked for."""
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    create = AWSNodeProvider.create_node

    def and_no_further(self: Any, node_config: Any, tags: Any, count: int) -> Any:
        create(self, node_config, tags, count)
        raise Stopped

    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(with_an_image(ec2)), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(AWSNodeProvider, "create_node", and_no_further)
        with pytest.raises(Stopped):
            commands.create_or_update_cluster(
                config_file=str(path),
                override_min_workers=None,
                override_max_workers=None,
                no_restart=False,
                restart_only=False,
                yes=True,
                no_config_cache=True,
            )


# Ray leaves the file open.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_ray_up_asks_for_a_head_that_stays_behind_ssh_alone(
    aws: Any, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up(aws, tmp_path, monkeypatch)
    (request,) = asked
    assert (request["InstanceType"], request["MinCount"], request["MaxCount"]) == ("m6i.2xlarge", 1, 1)
    assert "InstanceMarketOptions" not in request
    assert request["IamInstanceProfile"] == {"Name": "raybd-head-mine"}
    assert request["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 200
    tags = {tag["Key"]: tag["Value"] for tag in request["TagSpecifications"][0]["Tags"]}
    assert tags["ray-cluster-name"] == "raybd"
    assert tags["ray-node-type"] == "head"
    assert tags["ray-user-node-type"] == "head"
    assert tags["Name"] == "ray-raybd-head"
    (machine,) = (m for group in aws.describe_instances()["Reservations"] for m in group["Instances"])
    assert machine["InstanceType"] == "m6i.2xlarge"
    assert "InstanceLifecycle" not in machine

    (pair,) = aws.describe_key_pairs()["KeyPairs"]
    assert request["KeyName"] == pair["KeyName"] == "ray-autoscaler_us-west-2"
    key = tmp_path / ".ssh" / f"{pair['KeyName']}.pem"
    assert key.stat().st_mode & 0o077 == 0
    (group,) = aws.describe_security_groups(GroupIds=request["SecurityGroupIds"])["SecurityGroups"]
    world = [rule["FromPort"] for rule in group["IpPermissions"] if rule["IpRanges"]]
    inside = [rule["UserIdGroupPairs"][0]["GroupId"] for rule in group["IpPermissions"] if not rule["IpRanges"]]
    assert (world, inside) == ([22], [group["GroupId"]])
    (subnet,) = aws.describe_subnets(SubnetIds=[request["SubnetId"]])["Subnets"]
    assert subnet["AvailabilityZone"] == "us-west-2a"


@pytest.mark.parametrize(("kind", "machine"), [("gpu_spot", "g5.2xlarge"), ("gpu4_spot", "g5.12xlarge")])
def test_the_autoscaler_asks_for_spot_machines(aws: Any, asked: list[dict[str, Any]], kind: str, machine: str) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.event_summarizer import EventSummarizer
    from ray.autoscaler._private.node_launcher import BaseNodeLauncher
    from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
    from ray.autoscaler._private.util import ConcurrentCounter, prepare_config

    ready = AWSNodeProvider.bootstrap_config(prepare_config(with_an_image(aws)))
    launcher = BaseNodeLauncher(
        provider=AWSNodeProvider(ready["provider"], ready["cluster_name"]),
        pending=ConcurrentCounter(),
        event_summarizer=EventSummarizer(),
        node_provider_availability_tracker=NodeProviderAvailabilityTracker(),
        node_types=ready["available_node_types"],
    )
    launcher.pending.inc(kind, 1)
    assert launcher.launch_node(ready, 1, kind)
    (request,) = asked
    assert request["InstanceType"] == machine
    assert request["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert request["IamInstanceProfile"] == {"Name": "raybd-worker-mine"}
    tags = {tag["Key"]: tag["Value"] for tag in request["TagSpecifications"][0]["Tags"]}
    assert (tags["ray-node-type"], tags["ray-user-node-type"]) == ("worker", kind)
    (found,) = (m for group in aws.describe_instances()["Reservations"] for m in group["Instances"])
    assert found["InstanceLifecycle"] == "spot"


def test_ray_finds_out_what_machines_have_as_raybd_tells_it(aws: Any) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    from raybd.cluster.node_types import node_types

    found = with_an_image(aws)
    rays = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(found))["available_node_types"]
    for kind in node_types(found):
        resources = rays[kind.name]["resources"]
        assert (resources["CPU"], resources.get("GPU", 0)) == (kind.cpus, kind.gpus)
    assert rays["head"]["resources"]["head"] == 1
    assert json.dumps(rays)

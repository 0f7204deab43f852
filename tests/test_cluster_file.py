"""`raybd validate` of cluster files: every mistake with its line, before a machine is paid for."""

from __future__ import annotations

import copy
import gzip
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import FILES, config, filled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from raybd import study_file
from raybd.cli import app
from raybd.cluster import cluster_file, credentials, rays_rules
from raybd.cluster.node_types import aws_machine, max_workers, node_types
from raybd.errors import StudyError
from raybd.study import Study

STUDY = Path(__file__).parent / "studies" / "tiny.yaml"
runner = CliRunner()
GPU = ["resources.use_gpu=true", "resources.num_workers=4", "resources.concurrent_trials=4"]


def study(*sets: str) -> Study:
    return study_file.load(str(STUDY), overrides=[*GPU, *sets])


def refusal(text: str, wanted: Study | None = None) -> StudyError | None:
    try:
        cluster_file.parse(text, source="c.yaml", study=wanted)
    except StudyError as error:
        return error
    return None


def mistakes_of(text: str, *sets: str, wanted: Study | None = None) -> list[str]:
    """Return what is wrong with a file, a line for each; none where it is fine."""
    error = refusal(text, wanted or (study(*sets) if sets else None))
    if error is None:
        return []
    assert error.exit_code == 2
    head, *lines = error.what.splitlines()
    assert not lines or head == f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in the cluster file"
    return [line.strip() for line in lines] or [str(error)]


def changed(name: str, *changes: tuple[str, Any]) -> str:
    """Return a file that comes along with some settings changed, or taken out where the value is None."""
    found = copy.deepcopy(config(name))
    for at, value in changes:
        *way, last = at.split(".")
        inner = found
        for key in way:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return yaml.safe_dump(found, sort_keys=False)


@pytest.mark.parametrize("name", FILES)
def test_files_that_come_along_are_fine_once_filled_in(name: str) -> None:
    assert mistakes_of(filled(name)) == []
    assert mistakes_of(filled(name), wanted=study()) == []


@pytest.mark.parametrize("name", FILES)
def test_what_is_to_be_filled_in_is_told_once_with_its_line(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    found = mistakes_of(text)
    words = {"aws": {"BUCKET", "AMI_ID"}, "gcp": {"BUCKET", "PROJECT_ID", "IMAGE"}}
    expected = words.get(name, {"BUCKET", "HEAD_ADDRESS", "WORKER_ADDRESS", "USER_NAME"})
    assert len(found) == len(expected)
    for line in found:
        number, word = int(line.split(":")[1]), line.split(" in for ")[1].split(",")[0]
        assert word in expected
        assert word in text.splitlines()[number - 1] or "&" in text.splitlines()[number - 1]


def test_variables_of_the_shell_are_not_to_be_filled_in() -> None:
    text = changed("aws", ("head_setup_commands", ["echo $BUCKET ${BUCKET} BUCKETS"]))
    assert mistakes_of(text) == []


# --- one file, one mistake: what is changed, the setting that is named, what is said of it
ONE = {
    "unknown key": ("aws", [("max_wrokers", 4)], "max_wrokers", "unknown key, did you mean 'max_workers'?"),
    "unknown key of a node type": (
        "aws",
        [("available_node_types.gpu_spot.max_worker", 4)],
        "available_node_types.gpu_spot.max_worker",
        "unknown key, did you mean 'max_workers'?",
    ),
    "key of a node type beside them": ("gcp", [("min_workers", 1)], "min_workers", "available_node_types.NAME.min_wor"),
    "key nobody reads": ("aws", [("provider.regoin", "x")], "provider.regoin", "unknown key, did you mean 'region'?"),
    "not a number": ("aws", [("max_workers", "four")], "max_workers", "takes a whole number, got a text"),
    "negative": ("aws", [("idle_timeout_minutes", -1)], "idle_timeout_minutes", "takes 0 or more, got -1"),
    "no name": ("aws", [("cluster_name", None)], "cluster_name", "missing"),
    "no node_config": (
        "aws",
        [("available_node_types.gpu_spot.node_config", None)],
        "available_node_types.gpu_spot.node_config",
        "missing",
    ),
    "no instance type": (
        "aws",
        [("available_node_types.gpu_spot.node_config.InstanceType", None)],
        "available_node_types.gpu_spot.node_config.InstanceType",
        "missing: what machine it is",
    ),
    "no region": ("aws", [("provider.region", None)], "provider.region", "missing"),
    "no such head": ("aws", [("head_node_type", "haed")], "head_node_type", "no node type 'haed', did you mean 'head'"),
    "no head": ("aws", [("head_node_type", None)], "head_node_type", "missing (known: head, gpu_spot, gpu4_spot)"),
    "no node types": ("aws", [("available_node_types", None)], "available_node_types", "missing"),
    "no such provider": ("aws", [("provider.type", "awss")], "provider.type", "no provider 'awss', did you mean 'aws'"),
    "more at least than at most": (
        "aws",
        [("available_node_types.gpu4_spot.min_workers", 2)],
        "available_node_types.gpu4_spot.min_workers",
        "2, and max_workers of it is 1",
    ),
    "more at least than all": (
        "gcp",
        [("available_node_types.gpu_spot.min_workers", 3), ("max_workers", 2)],
        "max_workers",
        "2, and min_workers of all",
    ),
    "more GPUs than the machine has": (
        "aws",
        [("available_node_types.gpu_spot.resources", {"GPU": 4})],
        "available_node_types.gpu_spot.resources.GPU",
        "4, and g5.2xlarge has 1",
    ),
    "no bucket": ("aws", [("metadata", None)], "metadata.storage_path", "missing: workers are on several machines"),
    "a folder for a bucket": (
        "aws",
        [("metadata.storage_path", "/home/ubuntu/runs")],
        "metadata.storage_path",
        "no place that all machines can write to",
    ),
    "a file URL for a bucket": (
        "local",
        [("metadata.storage_path", "file:///runs")],
        "metadata.storage_path",
        "no place that",
    ),
    "nothing pins the driver": (
        "aws",
        [("available_node_types.head.resources", {})],
        "available_node_types.head.resources",
        "no custom resource that the head alone has, for the driver to ask for: add head: 1",
    ),
    "workers have the driver's resource": (
        "gcp",
        [("available_node_types.gpu_spot.resources", {"CPU": 8, "GPU": 1, "head": 1})],
        "available_node_types.head.resources",
        "no custom resource that the head alone has",
    ),
    "workers of the head's type": (
        "aws",
        [("available_node_types.head.max_workers", 2)],
        "available_node_types.head.max_workers",
        "set it to 0",
    ),
    "nothing pins the driver to a machine": (
        "local",
        [("head_start_ray_commands", ["ray start --head"])],
        "head_start_ray_commands",
        """add --resources='{"head": 1}'""",
    ),
    "no addresses": ("local", [("provider.worker_ips", None)], "provider.worker_ips", "missing"),
    "node types of machines that are there": (
        "local",
        [("available_node_types", {"a": {"resources": {}, "node_config": {}}})],
        "available_node_types",
        "take it out",
    ),
    "Ray's nightly build": ("aws", [("setup_commands", None)], "setup_commands", "a nightly build of Ray"),
    "a command that YAML cuts off at a comment": (
        "local",
        [("setup_commands", yaml.safe_load("- echo 'a  # b' >> c"))],
        "setup_commands.0",
        "a quote without its end",
    ),
    "a command of one node type that no shell takes": (
        "aws",
        [("available_node_types.head.worker_setup_commands", ["if true; then echo"])],
        "available_node_types.head.worker_setup_commands.0",
        "no shell takes it",
    ),
    "a container without a name": ("aws", [("docker", {"image": "i"})], "", "Ray would refuse it: Must provide a"),
}


@pytest.mark.parametrize("case", ONE)
def test_a_mistake_is_told_with_line_key_and_what_to_do(case: str) -> None:
    name, changes, key, what = ONE[case]
    text = changed(name, *changes)
    (line,) = mistakes_of(text)
    assert line.startswith("c.yaml")
    assert f": {key}: " in line or not key
    assert what in line
    last = key.rpartition(".")[2]
    if last and changes[0][1] is not None and f"\n{last}:" in text:
        assert f"{last}:" in text.splitlines()[int(line.split(":")[1]) - 1]


def test_a_bucket_and_a_pin_are_asked_for_only_where_there_are_workers() -> None:
    alone = [("max_workers", 0), ("metadata", None), ("available_node_types.head.resources", {})]
    for kind in ("gpu_spot", "gpu4_spot"):
        alone.append((f"available_node_types.{kind}.max_workers", 0))
    assert mistakes_of(changed("aws", *alone)) == []


def test_machines_that_are_there_may_share_a_folder() -> None:
    assert mistakes_of(changed("local", ("metadata.storage_path", "/mnt/runs"))) == []


def test_all_mistakes_are_told_at_once_in_order() -> None:
    text = changed(
        "aws",
        ("idle_timeout_minuts", 1),
        ("metadata", None),
        ("available_node_types.head.resources", {}),
        ("auth.ssh_usr", "x"),
        ("head_setup_commands", ["export GITHUB_TOKEN=abcdefgh"]),
        ("available_node_types.gpu_spot.max_workers", 1),
        ("available_node_types.gpu4_spot.max_workers", 0),
    )
    found = mistakes_of(text, "resources.num_workers=4")
    assert len(found) == 6
    lines = [int(line.split(":")[1]) for line in found]
    assert lines == sorted(lines)


# --- the study


def with_study(text: str, *sets: str) -> list[str]:
    return mistakes_of(text, wanted=study(*sets))


@pytest.mark.parametrize(
    ("sets", "key", "what"),
    [
        (
            ["resources.cpus_per_trial=49"],
            "available_node_types",
            "no node type fits a trial of 49 CPUs and 1 GPU (head",
        ),
        (
            ["resources.num_workers=1", "resources.cpus_per_worker=64"],
            "available_node_types",
            "no node type fits a pretraining worker of 64 CPUs and 1 GPU",
        ),
        # One machine with four, three with one.
        (["resources.num_workers=8"], "max_workers", "7 of 8 pretraining workers of 1 CPU and 1 GPU fit"),
        (["resources.num_workers=8"], "max_workers", "raise it to 5, or --set resources.num_workers=7"),
        (
            ["resources.num_workers=9"],
            "available_node_types.gpu4_spot.max_workers",
            "raise it to 2, and max_workers of the cluster",
        ),
        (["resources.use_gpu=auto", "resources.num_workers=1"], "available_node_types", "--set resources.use_gpu=true"),
    ],
)
def test_what_would_wait_for_ever_is_refused(sets: list[str], key: str, what: str) -> None:
    for name in ("aws", "gcp"):
        (line,) = with_study(filled(name), *sets)
        assert f": {key}: " in line
        assert what in line


def test_fewer_gpus_than_a_study_wants() -> None:
    bare = [(f"available_node_types.{kind}.resources", {"CPU": 8}) for kind in ("gpu_spot", "gpu4_spot")]
    found = with_study(changed("gcp", *bare))
    assert len(found) == 2
    assert all("no node type fits" in line and "8 CPUs and no GPU" in line for line in found)
    assert with_study(changed("gcp", *bare), "resources.use_gpu=false", "resources.num_workers=1") == []


def test_workers_of_a_cpu_study_count_the_head() -> None:
    cpu = ["resources.use_gpu=false", "resources.cpus_per_worker=8"]
    types = [(f"available_node_types.{kind}.max_workers", 0) for kind in ("gpu_spot", "gpu4_spot")]
    assert with_study(changed("gcp", *types), *cpu, "resources.num_workers=1") == []
    (line,) = with_study(changed("gcp", *types), *cpu, "resources.num_workers=2")
    assert "1 of 2 pretraining workers of 8 CPUs fit" in line


def test_a_machine_that_is_not_known_is_not_refused_but_noted() -> None:
    unknown = [
        (f"available_node_types.{kind}.node_config.InstanceType", "zz9.large") for kind in ("gpu_spot", "gpu4_spot")
    ]
    verdict = cluster_file.parse(changed("aws", *unknown), source="c.yaml", study=study())
    assert [note.partition(":")[0] for note in verdict.notes] == ["gpu_spot (zz9.large)", "gpu4_spot (zz9.large)"]


def test_a_fine_file_says_what_there_may_be_and_what_the_study_takes() -> None:
    verdict = cluster_file.parse(filled("aws"), source="c.yaml", study=study("resources.concurrent_trials=auto"))
    assert verdict.lines == (
        "1 × head (m6i.2xlarge): 8 CPUs and no GPU",
        "0 to 4 × gpu_spot (g5.2xlarge): 8 CPUs and 1 GPU",
        "0 to 1 × gpu4_spot (g5.12xlarge): 48 CPUs and 4 GPUs",
        "beside the head at most 4",
        "study tiny: 4 pretraining workers of 1 CPU and a GPU, 1 trial at once of 1 CPU and 1 GPU",
    )
    assert verdict.notes == (
        "auto counts what is there at the start: resources.concurrent_trials=1; say more with --set",
    )
    there = changed("aws", ("available_node_types.gpu_spot.min_workers", 4))
    assert cluster_file.parse(there, source="c", study=study("resources.use_gpu=auto")).lines[-1].count("GPU") == 2


def test_the_numbers_of_machines_are_those_of_aws() -> None:
    packed = (resources.files("moto.ec2") / "resources" / "instance_types.json.gz").read_bytes()
    machines = json.loads(gzip.decompress(packed))
    known = {name: found for name in machines if (found := aws_machine(name)) is not None}
    assert len(known) > 300
    for name, found in known.items():
        gpus = machines[name].get("GpuInfo", {}).get("Gpus", [])
        assert found == (machines[name]["VCpuInfo"]["DefaultVCpus"], sum(gpu["Count"] for gpu in gpus)), name
    assert {"g4dn.xlarge", "g5.12xlarge", "p4d.24xlarge", "p5.48xlarge", "m6i.2xlarge"} <= set(known)


@pytest.mark.parametrize("name", FILES)
def test_machines_are_counted_as_ray_counts_them(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config

    for changes in ([], [("max_workers", None)], [("max_workers", 1)]):
        if name == "local" and changes == [("max_workers", None)]:
            continue
        text = changed(name, *changes)
        mine, rays = yaml.safe_load(text), prepare_config(yaml.safe_load(text))
        assert max_workers(mine) == rays["max_workers"]
        if name != "local":
            limits = {kind.name: min(kind.most, rays["max_workers"]) for kind in node_types(mine)}
            assert limits == {
                kind: min(found["max_workers"], rays["max_workers"])
                for kind, found in rays["available_node_types"].items()
            }


# --- secrets

KEY_ID, KEY = "AKIA" + "IOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY"
SECRETS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "credentials": (
        "provider.aws_credentials",
        {"aws_access_key_id": KEY_ID, "aws_secret_access_key": KEY},
        (KEY_ID, KEY),
    ),
    "command": ("head_setup_commands", [f"export AWS_SECRET_ACCESS_KEY={KEY}"], (KEY,)),
    "quoted": ("head_setup_commands", [f"WANDB_API_KEY='{KEY}' x"], (KEY,)),
    "option": ("head_setup_commands", [f"tool --password {KEY}"], (KEY,)),
    "login": ("initialization_commands", [f"docker login -u me -p {KEY} registry"], (KEY,)),
    "form": ("head_setup_commands", [f"aws configure set x {KEY_ID}"], (KEY_ID,)),
    "token": ("setup_commands", ["git clone https://ghp_" + "a1B2" * 9 + "@host/x"], ("ghp_" + "a1B2" * 9,)),
    "URL": ("setup_commands", [f"pip install -i https://me:{'p4ss' * 3}@host/x"], ("p4ss" * 3,)),
    "private key": ("auth.ssh_private_key", "-----BEGIN OPENSSH PRIVATE KEY-----\nQUJD\n-----END", ("QUJD",)),
    "service account": (
        "provider.gcp_credentials",
        {"type": "service_account", "credentials": '{"private_key": "QUJDRA"}'},
        ("QUJDRA",),
    ),
    "key of a mapping": ("metadata", {"storage_path": "s3://mine", KEY_ID: 1}, (KEY_ID,)),
    "unknown key": (KEY_ID, 1, (KEY_ID,)),
    "number": ("metadata", {"storage_path": "s3://mine", "password": 12345678}, ("12345678",)),
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_refused_by_name_and_never_shown(case: str) -> None:
    at, value, hidden = SECRETS[case]
    text = changed("aws", (at, value))
    with pytest.raises(StudyError) as caught:
        cluster_file.parse(text, source="c.yaml", study=study())
    said = str(caught.value) + repr(caught.value) + str(caught.value.__cause__)
    assert "is written into the file" in said
    assert not [secret for secret in hidden if secret in said]


def test_paths_variables_and_modes_are_no_secrets() -> None:
    commands = [
        "export TOKEN=$TOKEN AWS_SECRET_ACCESS_KEY=${KEY} RAY_AUTH_MODE=token; docker login --password-stdin -u me",
        "export TOKENIZERS_PARALLELISM=false HF_TOKEN_CHECK=no MAX_TOKENS=1000",
        """echo "$(echo "it's")" && curl http://host:8080/a@b""",
        "export API_KEY=$(cat ~/key) && tool --token-file x --password=$PASSWORD && cat /etc/secret",
    ]
    text = changed("aws", ("head_setup_commands", commands), ("auth.ssh_private_key", "~/.ssh/key.pem"))
    assert list(credentials.found(yaml.safe_load(text))) == []
    assert mistakes_of(text) == []


@pytest.mark.parametrize(
    "text", [f"a: !{KEY_ID} x", f"a: *{KEY_ID}", f"provider: {{'{KEY_ID}': ]", f"a: !!int {KEY_ID}"]
)
def test_what_is_not_yaml_shows_no_secret_either(text: str) -> None:
    with pytest.raises(StudyError) as caught:
        cluster_file.parse(text, source="c.yaml")
    assert KEY_ID not in str(caught.value)
    assert caught.value.where == "c.yaml:1"


def test_a_secret_is_told_once() -> None:
    found = mistakes_of(changed("aws", ("provider.aws_credentials", {"aws_access_key_id": KEY_ID})))
    assert [line.split(": ")[1:3] for line in found] == [
        ["provider.aws_credentials.aws_access_key_id", "an AWS access key is written into the file"]
    ]


# --- YAML


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("cluster_name: a\nprovider: {type: aws\n", "c.yaml:3", "not valid YAML"),
        ("cluster_name: a\n\tprovider: x\n", "c.yaml:2", "not valid YAML"),
        ("- a\n", "c.yaml:1", "a cluster file is a mapping of settings"),
        ("", "c.yaml:1", "a cluster file is a mapping of settings"),
        ("cluster_name: a\nprovider: !!python/name:os.system x\n", "c.yaml:2", "not valid YAML for Ray"),
        ("a: &a [*a]\n", "c.yaml", "nested too deeply"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(text: str, where: str, what: str) -> None:
    with pytest.raises(StudyError, match=what) as caught:
        cluster_file.parse(text, source="c.yaml")
    assert caught.value.where == where


def test_keys_given_twice_and_keys_that_are_no_text() -> None:
    text = filled("aws") + "max_workers: 9\n"
    (line,) = mistakes_of(text)
    assert line == f"c.yaml:{len(text.splitlines())}: max_workers: given twice"
    (line,) = mistakes_of(filled("aws") + "no_restart: {1: 2}\n")
    assert "no_restart.1: this key is not text: put it in quotes" in line


def test_merged_mappings_are_read_as_ray_reads_them() -> None:
    assert "<<: *gpu" in filled("gcp")
    kinds = {kind.name: kind for kind in node_types(config("gcp"))}
    assert kinds["gpu4_spot"].machine == "g2-standard-48"
    assert mistakes_of(filled("gcp").replace("machineType: g2-standard-48", "x: y")) == []


# --- the command


def run(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(app, ["validate", *arguments])
    if isinstance(result.exception, StudyError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_command_tells_cluster_files_from_studies(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(filled("aws"), encoding="utf-8")
    code, said = run(str(path), "--study", str(STUDY), *(part for each in GPU for part in ("--set", each)))
    assert (code, said.splitlines()[0]) == (0, f"{path}: fine")
    assert "study tiny: 4 pretraining workers" in said
    code, said = run(str(path), "--study", str(STUDY), "--set", "resources.num_workers=99")
    assert code == 2
    assert "80 of 99 pretraining workers of 1 CPU fit" in said
    code, said = run(str(path), "--set", "a=b")
    assert (code, said.splitlines()[0]) == (2, "--set: --set is of studies")
    assert run(str(tmp_path / "none.yaml"), "--study", str(STUDY))[1].startswith(f"{tmp_path}/none.yaml: no such clust")
    assert run(str(STUDY)) == (0, f"{STUDY}: fine (2 pretrain objectives, 4 trials)\n")
    assert run("small/methods") == (0, "small/methods: fine (1 pretrain objective, 15 trials)\n")
    # A grid has no more trials than points.
    assert "(2 pretrain objectives, 10 trials)" in run("small/grid", "--set", "search.num_trials=99")[1]
    path.write_text("cluster_name: [\n")
    assert run(str(path))[0] == 2


@pytest.mark.parametrize("text", ["provider:\n", '"cluster_name" : x', "a: 1\nhead_node_type: x", "{provider: {}}"])
def test_what_a_cluster_file_is(text: str) -> None:
    assert cluster_file.is_one(text)


def test_nothing_but_the_verdict_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(changed("aws", ("available_node_types.gpu_spot.max_workers", None)), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "raybd", "validate", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{path}: fine"
    path.write_text(FILES["aws"].read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "raybd", "validate", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}: 2 mistakes in the cluster file\n  {path}:")


def test_no_study_is_one() -> None:
    for path in study_file.shipped().values():
        assert not cluster_file.is_one(path.read_text(encoding="utf-8"))


# --- any mapping

KEYS = [
    *rays_rules.schema()["properties"],
    "head",
    "gpu_spot",
    "resources",
    "node_config",
    "InstanceType",
    "CPU",
    "GPU",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**65),
    st.floats(),
    st.sampled_from(
        ["aws", "gcp", "local", "kuberay", "external", "head", "s3://b", "ray start --resources '{", KEY_ID]
    ),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def near(draw: st.DrawFn) -> dict[str, Any]:
    """A file that comes along, some of whose settings, anywhere, are something else."""
    found = copy.deepcopy(config(draw(st.sampled_from(sorted(FILES)))))
    for _ in range(draw(st.integers(1, 3))):
        inner: Any = found
        while True:
            key = draw(st.sampled_from(list(inner)) if isinstance(inner, dict) else st.integers(0, len(inner) - 1))
            if isinstance(inner[key], dict | list) and inner[key] and draw(st.booleans()):
                inner = inner[key]
                continue
            if draw(st.booleans()) and isinstance(inner, dict):
                del inner[key]
            else:
                inner[key] = draw(VALUES)
            break
        if not found:
            break
    return found


@example({"provider": {"type": "local", "head_ip": 1, "worker_ips": [None]}, "cluster_name": ""})
@example({"provider": {"type": "kuberay"}, "cluster_name": "a", "available_node_types": {}, "head_node_type": "a"})
@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6) | near())
def test_any_mapping_is_fine_for_ray_too_or_ends_in_one_clear_error(found: dict[str, Any]) -> None:
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    error = refusal(text, study())
    if error is not None:
        assert str(error).startswith("c.yaml")
        assert KEY_ID not in str(error)
        return
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(text)))

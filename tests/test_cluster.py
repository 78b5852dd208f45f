"""The files of docs/cluster: read by the real clients where they are installed, and run as far as a shell can."""

import json
import os
import re
import shlex
import subprocess
import types
from pathlib import Path

import pytest
import yaml
from jax._src.clusters import ClusterEnv

import launch

FILES = Path(__file__).resolve().parent.parent / "docs" / "cluster"
KEYS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def cluster(name):
    return next(c for c in ClusterEnv._cluster_types if c.__name__ == name)


def programs(folder, **scripts):
    """A PATH whose programs are these shell scripts."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def joined(monkeypatch, command, environment):
    """What launch.py takes from a command and its environment: coordinator, processes, number of this one."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = launch.parse(command[2:])
    assert command[:2] == ["python", "launch.py"] and args.tier == "d20"
    return args.coordinator, args.processes, args.process_id


@pytest.fixture
def options():
    """The options of the Slurm script."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (FILES / "slurm.sbatch").read_text(), re.M))


def test_slurm_starts_one_process_a_node_and_jax_finds_them(options, monkeypatch):
    nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
    assert nodes == 2 and tasks == 1 and int(options["gpus-per-node"]) == 8
    for name, value in {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    found = cluster("SlurmCluster")
    assert found.is_env_present() and found.get_process_count() == 2 and found.get_process_id() == 1
    assert found.get_coordinator_address(None, None).startswith("gpu07:")
    assert launch.whole_host(os.environ), "the only task of a node takes all its devices"
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert not launch.whole_host(os.environ)


@pytest.mark.parametrize(("code", "again"), [(75, True), (0, False), (3, False)])
def test_slurm_queues_a_stopped_run_again_and_no_other(options, tmp_path, code, again):
    path = programs(
        tmp_path, srun='exec "$@"', python=f'printf "%s\\n" "$@" > ran; exit {code}', scontrol="echo $@ > queued"
    )
    environment = {"PATH": path, "SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert subprocess.run(["bash", FILES / "slurm.sbatch"], env=environment, check=False).returncode == code
    assert (tmp_path / "queued").exists() == again and options["signal"].startswith("TERM@")
    args = launch.parse((tmp_path / "ran").read_text().splitlines()[1:])
    assert (args.tier, args.data, args.run_dir) == ("d20", "files:text/*.parquet", "runs/d20")


@pytest.fixture
def jobset():
    return yaml.safe_load((FILES / "jobset.yaml").read_text())


def test_jobset_names_the_coordinator_as_jax_would(jobset, monkeypatch):
    [job] = jobset["spec"]["replicatedJobs"]
    spec, name = job["template"]["spec"], jobset["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and job["replicas"] == 1
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    given = {e["name"]: e.get("value") for e in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(given["JAX_NUM_PROCESSES"])
    index = next(e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"] if e["name"] == "JAX_PROCESS_ID")
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # JAX's own detection, of the objects that the controller makes of this file
    found, labels = cluster("K8sCluster"), {"jobset.sigs.k8s.io/jobset-name": name}
    metadata = types.SimpleNamespace(name=f"{name}-{job['name']}-0", labels=labels)
    monkeypatch.setattr(found, "_controller", lambda: types.SimpleNamespace(kind="Job"))
    monkeypatch.setattr(found, "_job", lambda: types.SimpleNamespace(metadata=metadata))
    monkeypatch.setattr(found, "_pod", lambda: types.SimpleNamespace(spec=types.SimpleNamespace(subdomain=name)))
    port = str(container["ports"][0]["containerPort"])
    assert found.get_coordinator_address(None, port) == given["JAX_COORDINATOR_ADDRESS"]
    command = shlex.split(container["command"][-1].partition("exec ")[2])
    place = joined(monkeypatch, command, given | {"JAX_PROCESS_ID": "1"})
    assert place == (f"jaxchat-train-0-0.jaxchat:{port}", 2, 1)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert "/shared/" in container["command"][-1]


def test_jobset_is_read_by_the_client_of_kubernetes(jobset):
    kubernetes = pytest.importorskip("kubernetes", minversion="37", reason="pip install 'kubernetes>=37'")
    client = kubernetes.client
    for job in jobset["spec"]["replicatedJobs"]:
        text = json.dumps(job["template"]["spec"])
        spec = client.ApiClient().deserialize(text, "V1JobSpec", "application/json")
        back = client.ApiClient().sanitize_for_serialization(spec)
        assert back == job["template"]["spec"], "a key that the client does not know is lost on the way"


def test_skypilot_hands_over_its_nodes(monkeypatch, tmp_path):
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    path = programs(tmp_path, python='{ printf "%s\\n" "$@"; echo --; env; } > ran')
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    environment = {"PATH": path, "SKYPILOT_NODE_RANK": "1", **nodes}
    subprocess.run(["bash", "-eu", "-c", task["run"]], env=environment, cwd=tmp_path, check=True)
    arguments, _, found = (tmp_path / "ran").read_text().partition("\n--\n")
    given = dict(line.split("=", 1) for line in found.splitlines() if line.startswith("JAX_"))
    command = ["python", *arguments.splitlines()]
    assert joined(monkeypatch, command, given) == ("10.0.0.4:12355", 2, 1)
    assert any(argument.startswith("/shared/") for argument in command) and "/shared" in task["volumes"]


def test_skypilot_reads_its_file(monkeypatch):
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    monkeypatch.chdir(FILES.parent.parent)  # where workdir points
    task = sky.Task.from_yaml(str(FILES / "skypilot.yaml"))
    assert task.num_nodes == 2 and "launch.py --tier d20" in task.run
    assert all(resources.accelerators == {"H100": 8} for resources in task.resources)

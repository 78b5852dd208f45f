"""Dockerfile, compose file and Kubernetes manifests: read strictly, held against the code; the image's very steps."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import dockerfile
import pytest
import yaml
from small_model import write_run

import launch
from jaxchat.config import ServeConfig
from serve.app import CLOSE_SECONDS

ROOT = Path(__file__).resolve().parent.parent
SERVE = ROOT / "serve"
DOCKERFILE = SERVE / "Dockerfile"
USER = 10001
COMMAND = ["--run-dir", "/model", "--serve", "--host", "0.0.0.0", "--port", "8000"]


class Strict(yaml.SafeLoader):
    """A key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: a key twice in {keys}"
        return super().construct_mapping(node, deep)


def documents(name):
    return list(yaml.load_all((SERVE / name).read_text(encoding="utf-8"), Strict))


BUILD = dockerfile.stages(DOCKERFILE)


def test_the_image_runs_as_nobody_in_particular():
    image = BUILD[-1]
    assert image.last("USER").value == f"{USER}:{USER}"
    after = image.steps[image.steps.index(image.last("USER")) :]
    assert not [step for step in after if step.name in ("RUN", "COPY")]  # what it runs belongs to root
    assert image.last("STOPSIGNAL").value == "SIGTERM"


def test_nothing_secret_and_nothing_else_gets_in():
    """The context holds exactly what is copied, and none of it is a run, data or a key."""
    ignored = (SERVE / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {word for stage in BUILD for step in stage.steps if step.name == "COPY" and "from" not in step.flags
              for word in step.words[:-1]}  # fmt: skip
    assert rules[0] == "*" and {name.split("/")[0] for name in copied} == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert not re.search(r"(?i)(secret|token|password|api_key)", DOCKERFILE.read_text())


def test_an_unknown_variant_ends_the_build():
    step = next(step for step in BUILD[0].steps if "VARIANT" in step.value and step.name == "RUN")
    wrong = subprocess.run(["sh", "-c", step.value], env={"VARIANT": "tpu"}, capture_output=True, text=True)
    assert wrong.returncode == 2 and "not tpu" in wrong.stderr


def test_every_package_of_the_service_has_its_bounds():
    def names(path):
        lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
        return [re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines if line]

    bounded = set(names(ROOT / "requirements.txt"))
    assert set(names(SERVE / "requirements.txt")) < bounded


def test_compose_gives_no_rights_and_time_to_drain():
    services = documents("compose.yaml")[0]["services"]
    assert set(services) == {"jaxchat", "jaxchat-cuda"}
    for service in services.values():
        assert service["command"] == COMMAND and service["user"] == f"{USER}:{USER}"
        assert service["read_only"] is True and service["volumes"][0]["read_only"] is True
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
        assert seconds(service["stop_grace_period"]) > ServeConfig().drain_seconds + CLOSE_SECONDS


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


KINDS = {document["kind"]: document for document in documents("kubernetes.yaml")}
POD = KINDS["Deployment"]["spec"]["template"]["spec"]


def test_kubernetes_gives_no_rights():
    assert KINDS["NetworkPolicy"]["spec"]["egress"] == []
    assert POD["securityContext"]["runAsNonRoot"] is True and POD["securityContext"]["runAsUser"] == USER
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    (container,) = POD["containers"]
    assert container["args"] == COMMAND and container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/model": True, "/tmp": False}


def test_kubernetes_waits_for_what_takes_its_time():
    (container,) = POD["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {probe["httpGet"]["path"] for probe in probes.values()} == {"/health"}
    lasts = {name: probe["periodSeconds"] * probe["failureThreshold"] for name, probe in probes.items()}
    drain = ServeConfig().drain_seconds
    assert lasts["startup"] >= 600 and lasts["liveness"] > drain and lasts["readiness"] <= 5
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["terminationGracePeriodSeconds"] > pause + drain + CLOSE_SECONDS


def test_keys_come_from_a_secret_and_reach_the_service(monkeypatch):
    variable = POD["containers"][0]["env"][0]
    assert variable["name"] in documents("compose.yaml")[0]["x-service"]["environment"]
    assert "secretKeyRef" in variable["valueFrom"]
    monkeypatch.setenv(variable["name"], "one, two")
    assert launch.given_config(launch.parse(["--serve"]))[0].serve.api_keys == ("one", "two")
    assert launch.given_config(launch.parse(["--chat"]))[0].serve.api_keys == ()
    ports = [launch.given_config(launch.parse([name, "--port", "7"]))[0].serve.port for name in ("train", "serve")]
    assert ports == [8000, 7], "the page that follows a training is another one"


def test_what_the_service_imports_is_copied():
    """Neither `train` nor tests nor benchmarks: the image has none."""
    code = "import sys, serve.app, serve.page, launch; launch.main(['serve', 'runs/none'])"
    code += "; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    copied = (ROOT / "serve" / "Dockerfile").read_text()
    assert {name for name in done.stdout.split() if name in ours} == {"jaxchat", "serve"}
    assert all(f"COPY {name} {name}" in copied for name in ("jaxchat", "serve", "configs"))


@pytest.fixture
def folder():
    """A folder that every user can look into, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="image-"))
    path.chmod(0o755)
    yield path
    subprocess.run(["chmod", "-R", "u+w", path])
    shutil.rmtree(path)


def base_python():
    """(a Python of this version, whether another user may run it here): the image's base, as far as it is at hand."""
    own = Path(sys._base_executable).resolve()
    system = shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}", path="/usr/local/bin:/usr/bin")
    for path in (own, *([Path(system).resolve()] if system else [])):
        if os.geteuid() == 0 and all(part.stat().st_mode & 0o001 for part in (path, *path.parents)):
            return path, True
    return own, False


@pytest.mark.slow
def test_the_images_very_steps(folder):
    """Its RUN and COPY lines in an empty folder, then its command as a user without a name or rights, read-only."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "JAX"))}
    (folder / "base").mkdir()
    python, other_user = base_python()
    (folder / "base" / "python").symlink_to(python)
    clean["PATH"] = os.pathsep.join([str(folder / "base"), "/usr/local/bin", "/usr/bin", "/bin"])
    with open(folder / "build.log", "wb") as log:
        image = dockerfile.carry_out(DOCKERFILE, ROOT, folder / "image", clean, log=log)
    run = write_run(folder / "model")
    scratch = folder / "tmp"
    scratch.mkdir(mode=0o777)
    for path in (image.root, run.root):
        subprocess.run(["chmod", "-R", "a+rX,a-w", path], check=True)
    os.chmod(scratch, 0o1777)
    last = BUILD[-1]
    port = free_port()
    own = {"PATH": image.environment["PATH"], "LANG": "C.UTF-8"} | {
        word.partition("=")[0]: word.partition("=")[2].replace("/tmp", str(scratch))
        for word in last.last("ENV").words
        if not word.startswith("PATH=")
    }
    words = [*last.last("ENTRYPOINT").words, *last.last("CMD").words]
    command = [word.replace("/model", str(run.root)).replace("8000", str(port)) for word in words]
    check = [w.replace("8000", str(port)) for w in json.loads(last.last("HEALTHCHECK").value.partition(" ")[2])]
    options = {"cwd": image.path(""), "env": own} | (
        {"user": USER, "group": USER, "extra_groups": []} if other_user else {}
    )
    with open(folder / "service.log", "wb") as log:
        python = image.path("/opt/venv/bin/python")
        service = subprocess.Popen([python, *command[1:]], stdout=log, stderr=log, **options)
        try:
            begin = time.monotonic()
            first = subprocess.run([python, *check[1:]], capture_output=True, **options)
            assert first.returncode != 0  # it cannot be ready yet
            while subprocess.run([python, *check[1:]], capture_output=True, **options).returncode:
                assert service.poll() is None and time.monotonic() < begin + 240, (folder / "service.log").read_text()
                time.sleep(1)
            body = json.dumps({"messages": [{"role": "user", "content": "hello 🙂"}], "temperature": 0}).encode()
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
            )
            answer = json.load(urllib.request.urlopen(asked, timeout=60))
            assert answer["choices"][0]["message"]["content"] == "Hi 🙂 안녕!"
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read().decode()
            assert "jaxchat" in page and "gradio" in page
            service.terminate()
            assert service.wait(60) == 0, (folder / "service.log").read_text()
        finally:
            service.kill()
    assert "Traceback" not in (folder / "service.log").read_text()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

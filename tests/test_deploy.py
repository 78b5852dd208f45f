"""Images, compose files, Kubernetes manifests and the dev container: read strictly, held against the code, carried out.

python -m pytest tests/test_deploy.py -m slow -n0      the images' very steps: two environments, some minutes
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import dockerfile
import pytest
import yaml
from small_model import write_run
from whole_run import TINY, write_corpus

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
TRAINING = ROOT / "Dockerfile"
each_image = pytest.mark.parametrize("path", [DOCKERFILE, TRAINING], ids=["service", "training"])


@each_image
def test_the_image_runs_as_nobody_in_particular(path):
    image = dockerfile.stages(path)[-1]
    assert image.last("USER").value == f"{USER}:{USER}"
    after = image.steps[image.steps.index(image.last("USER")) :]
    assert not [step for step in after if step.name in ("RUN", "COPY")]  # what it runs belongs to root
    assert image.last("STOPSIGNAL").value == "SIGTERM"


@each_image
def test_nothing_secret_and_nothing_else_gets_in(path):
    """The context holds exactly what is copied, and none of it is a run, data or a key."""
    ignored = path.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {word for stage in dockerfile.stages(path) for step in stage.steps
              if step.name == "COPY" and "from" not in step.flags for word in step.words[:-1]}  # fmt: skip
    assert rules[0] == "*" and {name.split("/")[0] for name in copied} == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert not re.search(r"(?i)(secret|token|password|api_key)", path.read_text())


@each_image
def test_an_unknown_variant_ends_the_build(path):
    step = next(step for step in dockerfile.stages(path)[0].steps if "VARIANT" in step.value and step.name == "RUN")
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


def compose(**variables):
    """The services of /compose.yaml, as Docker reads them with these variables of the environment."""
    text = re.sub(r"^ *#.*", "", (ROOT / "compose.yaml").read_text(encoding="utf-8"), flags=re.M)
    text = re.sub(r"(?<!\$)\$\{(\w+):-(\w*)\}", lambda m: variables.get(m[1]) or m[2], text)
    assert not re.search(r"(?<!\$)\$(?!\$)", text), "a variable without its default"
    return yaml.load(text.replace("$$", "$"), Strict)


def test_compose_trains_with_the_page_beside_it():
    image, file = dockerfile.stages(TRAINING)[-1], compose(TIER="book", PORT="9001")
    services = file["services"]
    assert set(services) == {"train", "cuda", "watch"} and "profiles" not in services["train"] | services["watch"]
    config, directory = launch.given_config(launch.parse(services["train"]["command"]))
    assert (config.tier, config.data.cache_dir, str(directory)) == ("book", "cache", "runs/book")
    assert config.train.sample_every > 0
    owned = {word for step in image.steps if step.name == "RUN" for word in re.findall(r"chown \S+ (.*)", step.value)}
    assert owned == {"runs cache"} and image.last("WORKDIR").value == "/app"
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert (ROOT / service["build"]["context"] / "Dockerfile").samefile(TRAINING)
        mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}
        assert mounts["/app/runs"] == "runs" and set(mounts.values()) <= file["volumes"].keys()
        assert name == "watch" or mounts["/app/cache"] == "cache"
    assert services["cuda"]["command"] == services["train"]["command"]
    assert services["cuda"]["build"]["args"]["VARIANT"] in ("cuda", "cuda12")
    assert services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    watch = services["watch"]
    assert watch["volumes"] == ["runs:/app/runs:ro"] and watch["ports"] == ["127.0.0.1:9001:8001"]
    images = [service["image"] for service in services.values()]
    assert len(set(images)) == len(images), "two builds of one name"


def watch_service(place, port, **variables):
    """The service `watch` of /compose.yaml in a folder that stands for /app; its process."""
    service = compose(**variables)["services"]["watch"]
    *shell, script = service["entrypoint"]
    environment = os.environ | {name: str(value or "") for name, value in service["environment"].items()}
    words = [*shell, script.replace("--host 0.0.0.0", f"--host 0.0.0.0 --port {port}")]
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def asked(url, password=""):
    """The JSON at an address; None where nobody answers, the status where the answer is no."""
    word = base64.b64encode(f":{password}".encode()).decode()
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Basic {word}"} if password else {})
        return json.load(urllib.request.urlopen(request, timeout=5))
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return None


def test_the_page_of_compose_opens_with_the_password_that_its_log_says(tmp_path):
    (tmp_path / "launch.py").symlink_to(ROOT / "launch.py")
    (tmp_path / "runs").mkdir()
    port = free_port()
    process = watch_service(tmp_path, port, TIER="mine", PORT="9001")
    try:
        line = process.stdout.readline()
        password, address, end = line.split()[-1], f"http://127.0.0.1:{port}/watch/state", time.monotonic() + 60
        assert "http://127.0.0.1:9001/watch" in line and len(password) == 12
        while (state := asked(address, password)) is None:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        assert state["run"] == "mine" and state["status"] == "waiting" and asked(address) == 401
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
    with watch_service(tmp_path / "runs", 0, JAXCHAT_API_KEYS="my-own") as process:  # no program there: it ends
        assert process.stdout.readline().split()[-1] == "my-own" and process.wait(20)


def test_the_dev_container_installs_what_the_tests_need(tmp_path):
    file = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (tmp_path / "nvidia-smi").touch()
    for mode, expected in ((0o644, {"dev"}), (0o755, {"dev", "cuda"})):
        (tmp_path / "nvidia-smi").chmod(mode)
        line = 'pip() { echo "$3"; }; ' + file["postCreateCommand"]
        done = subprocess.run(["/bin/sh", "-c", line], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
        named = set(re.fullmatch(r"\.\[(.*)\]\n", done.stdout)[1].split(","))
        assert named == expected and named <= extras.keys()
    assert file["forwardPorts"] == [ServeConfig().port, launch.parse(["watch"]).port]


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


def built(path, folder):
    """The image of a Dockerfile, its steps carried out below `folder`; options that start a process as its user."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "JAX"))}
    (folder / "base").mkdir()
    python, other_user = base_python()
    (folder / "base" / "python").symlink_to(python)
    clean["PATH"] = os.pathsep.join([str(folder / "base"), "/usr/local/bin", "/usr/bin", "/bin"])
    with open(folder / "build.log", "wb") as log:
        image = dockerfile.carry_out(path, ROOT, folder / "image", clean, log=log)
    return image, {"user": USER, "group": USER, "extra_groups": []} if other_user else {}


@pytest.mark.slow
def test_the_images_very_steps(folder):
    """Its RUN and COPY lines in an empty folder, then its command as a user without a name or rights, read-only."""
    image, as_user = built(DOCKERFILE, folder)
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
    options = {"cwd": image.path(""), "env": own} | as_user
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


@pytest.mark.slow
def test_the_training_images_very_steps(folder):
    """Its RUN and COPY lines, then compose's training in little and a chat with it, as a user without a name."""
    image, as_user = built(TRAINING, folder)
    subprocess.run(["chmod", "-R", "a+rX", image.root], check=True)
    (folder / "text").mkdir()
    write_corpus(folder / "text").chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    last = dockerfile.stages(TRAINING)[-1]
    own = {word.partition("=")[0]: word.partition("=")[2].replace("/tmp", str(folder / "tmp"))
           for word in last.last("ENV").words if not word.startswith("PATH=")}  # fmt: skip
    options = {"cwd": image.path(""), "env": own | {"PATH": image.environment["PATH"]}, "text": True} | as_user
    begin = [image.path("/opt/venv/bin/python"), *last.last("ENTRYPOINT").words[1:]]
    sets = [word for setting in TINY for word in ("--set", setting)]
    command = [*compose()["services"]["train"]["command"], *sets, "--data", f"files:{folder}/text/*.txt"]
    done = subprocess.run([*begin, *command], capture_output=True, timeout=600, **options)
    assert done.returncode == 0 and (image.path("runs") / "nano" / "report.md").exists(), done.stderr[-2000:]
    assert list(image.path("cache").glob("xla/*/*-cache"))
    chat = [*begin, "chat", "runs/nano"]
    talk = subprocess.run(chat, input="hello\n", capture_output=True, timeout=200, **options)
    assert talk.returncode == 0 and "Traceback" not in done.stderr + talk.stderr, talk.stderr[-2000:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

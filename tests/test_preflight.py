"""Before a run trains: devices found in made-up file systems, days on a CPU, disks that are too small."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_run import ROOT, TINY, arguments

import launch
from jaxchat.config import load_config
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.sizes import flops_per_token
from train.doctor import accelerators
from train.preflight import (
    before_training,
    check_room,
    check_time,
    checkpoint_bytes,
    disk_parts,
    product_rate,
    sft_tokens,
    training_flops,
    used,
)
from train.stages import STAGES, remaining, select

ALL = {stage.name for stage in STAGES}
GPU = {"dev/nvidia0": "", "dev/nvidiactl": ""}
KFD = "sys/class/kfd/kfd/topology/nodes"
PCI = "sys/bus/pci/devices/0000:00:04.0"


def machine(root, files):
    """A file system with these files; a text that begins with #! is a program."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    return root


def smi(line):
    return {"usr/bin/nvidia-smi": f"#!/bin/sh\necho '{line}'\n"}


def driver(number):
    return {
        "proc/driver/nvidia/version": f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {number}.65.06  Sun Jul 27\n"
    }


@pytest.mark.parametrize(("files", "name", "extra"), [
    (GPU, "NVIDIA GPU", "[cuda]"),
    (GPU | driver(580), "NVIDIA GPU", "[cuda]"),
    (GPU | driver(550), "NVIDIA GPU", "[cuda12]"),
    ({"dev/nvidia3": ""}, "NVIDIA GPU", "[cuda]"),  # one of a node's, in a container
    (GPU | smi("NVIDIA H100 80GB HBM3, 580.65.06, 9.0"), "NVIDIA H100 80GB HBM3", "[cuda]"),
    (smi("NVIDIA GeForce RTX 4090, 566.14, 8.9"), "NVIDIA GeForce RTX 4090", "[cuda12]"),  # as on WSL: no /dev/nvidia0
    (GPU | smi("Tesla P100-PCIE-16GB, 580.65.06, 6.0"), "Tesla P100-PCIE-16GB", "[cuda12]"),
    (GPU | {"usr/bin/nvidia-smi": "#!/bin/sh\nexit 9\n"}, "NVIDIA GPU", "[cuda]"),
    ({"dev/kfd": "", f"{KFD}/0/properties": "simd_count 0\n", f"{KFD}/1/properties": "simd_count 1216\n"}, "AMD GPU",
     "rocm7-local"),
    ({"dev/accel0": ""}, "TPU", "[tpu]"),
    ({"dev/vfio/0": "", f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x006f\n"}, "TPU", "[tpu]"),  # v6e
])  # fmt: skip
def test_devices_without_jax(tmp_path, files, name, extra):
    (found,) = accelerators(machine(tmp_path, files))
    assert found.name == name and extra in found.install


@pytest.mark.parametrize("files", [
    {"dev/null": ""},
    {"dev/nvidiactl": "", "usr/bin/nvidia-smi": "#!/bin/sh\nexit 6\n"},  # a driver without a card
    {"dev/kfd": "", f"{KFD}/0/properties": "cpu_cores_count 8\nsimd_count 0\n"},
    {"dev/accel/accel0": ""},  # a laptop's NPU
    {"dev/vfio/0": "", f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x0042\n"},  # Google's network card
])  # fmt: skip
def test_what_is_no_device(tmp_path, files):
    assert accelerators(machine(tmp_path, files)) == []


def test_the_line_comes_where_jax_is_on_the_cpu_and_was_not_told_to_be(tmp_path):
    machine(tmp_path, GPU)
    code = "from train.doctor import unused_accelerator as u; from pathlib import Path; import sys\n"
    code += "print(u(Path(sys.argv[1])))"
    said = {}
    for platforms in ("", "cpu"):
        env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | (
            {"JAX_PLATFORMS": "cpu"} if platforms else {}
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said[platforms] = done.stdout.strip()
    assert said["cpu"] == "None" and "pip install" in said[""] and "\n" not in said[""]


def test_days_on_a_cpu_stop_before_anything_is_downloaded(tmp_path, capsys):
    args = ["--tier", "d20", "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    assert launch.main(args) == 2
    assert "train.allow_slow=true" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_small_tiers_finished_stages_and_whoever_wants_to_go_on(tmp_path):
    run, d20 = RunDir(tmp_path), resolve(load_config("d20"))
    with pytest.raises(UsageError):
        check_time(d20, run, {"sft"})
    check_time(d20, run, ALL - {"pretrain", "sft", "rl"})
    check_time(dataclasses.replace(d20, train=dataclasses.replace(d20.train, allow_slow=True)), run, ALL)
    for tier in ("nano", "lotto", "ko-nano"):
        check_time(resolve(load_config(tier)), run, ALL)


def test_a_finished_run_has_nothing_left(finished):
    config = resolve(load_config(finished / "config.toml"))
    assert remaining(config, RunDir(finished), STAGES) == []
    before_training(config, RunDir(finished), STAGES)


def test_flops_that_are_left(tmp_path):
    config, run = resolve(load_config("nano")), RunDir(tmp_path)
    whole = training_flops(config, run, {"pretrain"})
    assert whole == flops_per_token(config.model) * config.train.steps * config.train.batch_tokens
    (run.stage("base") / "750").mkdir(parents=True)
    assert training_flops(config, run, {"pretrain"}) == whole / 4
    assert 0 < training_flops(config, run, {"sft", "rl"}) < whole


def test_a_cpu_has_a_rate():
    assert 1e8 < product_rate(repeats=1) < 1e14


def test_a_disk_that_is_too_small_is_said_first(corpus, tmp_path, capsys):
    wide = ["--set", "model.width=16384", "--set", "model.n_heads=1024", "--set", "model.depth=400"]
    args = arguments(corpus, tmp_path / "run", *wide, "--set", "train.allow_slow=true", "--cache-dir", str(tmp_path))
    assert launch.main(args) == 3
    said = capsys.readouterr().err
    assert "train.keep_last" in said and "--run-dir" in said and not (tmp_path / "run").exists()


def test_only_what_is_not_written_yet_needs_room(tmp_path):
    large = resolve(load_config("d32", ["model.depth=150", f"data.cache_dir={tmp_path}"]))
    with pytest.raises(DataError):
        check_room(large, RunDir(tmp_path), ALL)
    check_room(large, RunDir(tmp_path), {"eval", "report"})
    part = next(p for p in disk_parts(large) if p.name == "checkpoints, base")
    (tmp_path / "base").mkdir()
    with open(tmp_path / "base" / "sparse", "wb") as file:
        file.truncate(part.bytes)
    with pytest.raises(DataError) as error:
        check_room(large, RunDir(tmp_path), {"pretrain"})
    assert "checkpoints, base" not in str(error.value) and "being written" in str(error.value)


def test_the_issues_figures_of_d20():
    """9.2 GB a checkpoint of float32 (8.5 compressed), about 115 GB in all: a quarter of the text is dropped."""
    config = resolve(load_config("d20"))
    assert checkpoint_bytes(config) == pytest.approx(9.2e9 * 0.93, rel=0.01)
    assert sum(part.bytes for part in disk_parts(config)) == pytest.approx(1.15e11, rel=0.05)


def test_parts_are_those_of_a_run_of_nano():
    """Measured with du -sb on a run: base with two checkpoints, token shards, rows."""
    parts = {part.name: part.bytes for part in disk_parts(resolve(load_config("nano")))}
    measured = {"checkpoints, base": 95_701_734, "token shards": 6_990_392, "rows": 7_011_265}
    assert {name: parts[name] for name in measured} == pytest.approx(measured, rel=0.1)


def test_a_run_takes_what_was_counted(finished, corpus):
    """A tiny run: Orbax's own files weigh, and moments that are still zero take next to nothing."""
    config = resolve(load_config("nano", [*TINY, f'data.source="files:{corpus}/*.txt"']))
    parts = {part.name: part.bytes for part in disk_parts(config)}
    newest = max(int(p.name) for p in (finished / "base").iterdir() if p.name.isdigit())
    arrays = sum(p.stat().st_size for p in (finished / "base" / str(newest)).rglob("d/*") if p.stat().st_size > 5_000)
    assert 0.6 < arrays / checkpoint_bytes(config) < 1.05
    assert used(finished / "data" / "rows") == pytest.approx(parts["rows"], rel=0.5)
    assert len(list((finished / "base").glob("[0-9]*"))) == round(parts["checkpoints, base"] / checkpoint_bytes(config))


def test_more_checkpoints_and_copies_of_the_mixture_take_more():
    def total(*overrides):
        return sum(part.bytes for part in disk_parts(resolve(load_config("nano", overrides))))

    one = checkpoint_bytes(resolve(load_config("nano")))
    assert total("train.keep_last=3") - total() == pytest.approx(2 * one, rel=0.01)  # SFT saves only twice
    assert total("train.keep_every=400") - total() == pytest.approx(one, rel=0.01)  # 400; 800 and 1,000 stay anyway
    assert total("export.formats=[]") < total('export.dtype="bfloat16"') < total()
    doubled = resolve(load_config("nano", ['sft.mixture=["identity:3000*2"]']))
    assert sft_tokens(doubled) == 2 * sft_tokens(resolve(load_config("nano", ['sft.mixture=["identity:3000"]'])))


def test_selected_stages_alone_count(corpus, tmp_path):
    """Text can be packed for a large model on a machine that could not train it."""
    d20 = resolve(load_config("d20"))
    names = {stage.name for stage in remaining(d20, RunDir(tmp_path), select("tokenizer,prepare", None))}
    assert names == {"tokenizer", "prepare"}
    check_time(d20, RunDir(Path(tmp_path)), names)

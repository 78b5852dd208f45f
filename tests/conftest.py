"""Fixtures that several test files share."""

import gc
import os
import shutil
import tempfile

import pytest

from launch import CACHE_BYTES, open_cache

# What a process has compiled, the others and the next session read. Set before jax is imported.
if not {"PYTEST_XDIST_WORKER", "JAX_COMPILATION_CACHE_DIR"} & os.environ.keys():
    try:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(open_cache("~/.cache/jaxchat/tests"))
    except OSError:
        _compiled = tempfile.TemporaryDirectory(prefix="jaxchat-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(CACHE_BYTES)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
from whole_run import arguments, finish, start, write_corpus

from jaxchat.run_dir import locked

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A session that keeps every compiled program takes 7 GB and slows down; whoever needs one again reads it above."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers of a session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def corpus(shared):
    with locked(shared / "lock"):
        folder = shared / "corpus"
        folder.mkdir(exist_ok=True)
        return folder if any(folder.iterdir()) else write_corpus(folder)


@pytest.fixture(scope="session")
def finished(corpus, shared):
    """The directory of one whole undisturbed run."""
    run_dir = shared / "runs" / "whole"
    with locked(shared / "lock"):
        if not (run_dir / "report.json").exists():
            code, _, err = finish(start(arguments(corpus, run_dir)))
            assert code == 0, err
    return run_dir


@pytest.fixture(scope="module")
def browser():
    """A real Chromium; the test is skipped with the reason where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra: pip install -e '.[dev]'")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=CHROMIUM)
        yield chromium
        chromium.close()

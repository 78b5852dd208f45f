"""Fixtures that several test files share."""

import gc
import os
import tempfile

import pytest

# What one process of a session has compiled, the others read. Set before jax is imported.
_compiled = tempfile.TemporaryDirectory(prefix="jaxchat-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
from whole_run import arguments, finish, start, write_corpus  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A session that keeps every compiled program takes 7 GB and slows down; whoever needs one again reads it above."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """The directory of one whole undisturbed run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = finish(start(arguments(corpus, run_dir)))
    assert code == 0, err
    return run_dir

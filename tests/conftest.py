"""Fixtures that several test files share."""

import pytest
from whole_run import arguments, finish, start, write_corpus


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

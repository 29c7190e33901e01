"""One thread a process, places of this session's own for all caches, and what runs side by side.

Tests of one file run in one process, and so do all that share the Ray cluster; with ``-n 2``
other files run beside them.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

_CACHES = {
    "HF_HOME": "huggingface",
    "SEARCHMERGE_CACHE": "searchmerge",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
_ON_RAY = "tests/execution/"
_LONGEST_FIRST = (
    _ON_RAY,
    "tests/gpu/test_check.py",
    "tests/test_cli.py",
    "tests/merging/test_engine.py",
)
_is_controller = "PYTEST_XDIST_WORKER" not in os.environ  # or there is one process only

if _is_controller:  # the others inherit its environment
    _caches = Path(tempfile.mkdtemp(prefix="searchmerge-tests-"))
    os.environ.update({name: str(_caches / folder) for name, folder in _CACHES.items()})
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure():
    if _is_controller:
        shutil.rmtree(_caches, ignore_errors=True)


def group(nodeid):
    """Return the name of the tests that run in one process, one after the other."""
    file = nodeid.partition("::")[0]
    return _ON_RAY if file.startswith(_ON_RAY) else file


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(group(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    config.option.loadscopereorder = False  # not by the number of tests: the longest are first
    return Groups(config, log)


@pytest.fixture
def searchmerge(tmp_path, monkeypatch, capsys):
    """Call the command line in this process; return its exit code, output and errors."""
    from searchmerge.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for switch in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(switch, "1")  # as the command line itself does

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["searchmerge", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Make a tiny base and its experts, and return the folder that they lie in."""
    from tests.tiny import make_models

    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return root

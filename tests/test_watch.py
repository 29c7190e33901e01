"""Models that change while they are used are never taken for what they were."""

import json
import os
import shutil
import sys

import pytest

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import CheckpointError
from searchmerge.models import open_models
from searchmerge.run import run_study
from searchmerge.search.status import read_status
from searchmerge.study import read_study
from searchmerge.watch import Watch
from tests.search.conftest import Recorder
from tests.tiny import make_study

CONFIG = RunConfig(engine="eager", device="cpu")


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    for name in ("base", "first", "second"):
        shutil.copytree(models / name, tmp_path / name)
    return tmp_path


def weights_of(folder):
    return folder / "first" / "model.safetensors"


def replace(folder):
    other = folder / "first" / "new"
    shutil.copyfile(folder / "second" / "model.safetensors", other)
    other.rename(weights_of(folder))


def write_over(folder):
    file, stamp = weights_of(folder), weights_of(folder).stat()
    content = bytearray(file.read_bytes())
    content[-2] ^= 64
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def truncate(folder):
    os.truncate(weights_of(folder), weights_of(folder).stat().st_size - 64)


def touch(folder):
    os.utime(weights_of(folder), ns=(1, 1))


def remove(folder):
    weights_of(folder).unlink()


def change_config(folder):
    file = folder / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.5}))


CHANGES = {
    replace: r"first/model\.safetensors: changed while .*: another file is in its place; what was",
    write_over: r"first \(.*first\): changed while .*: weights holds something else than before",
    truncate: r"first/model\.safetensors: changed while .*: it had \d+ bytes and has \d+",
    touch: r"first/model\.safetensors: changed while the study uses it: it was written to",
    remove: r"first/model\.safetensors: cannot be read: No such file",
    change_config: r"base/config\.json: changed while the study uses it: ",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changed_is_named(folder, change):
    watch = Watch(open_models(read_study(make_study(folder))))
    watch.check()
    change(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=CHANGES[change]):
            watch.check()


def test_a_file_whose_rights_changed_is_the_same(folder):
    watch = Watch(open_models(read_study(make_study(folder))))
    weights_of(folder).chmod(0o600)
    os.link(folder / "base" / "config.json", folder / "base" / "linked")
    watch.check()
    write_over(folder)
    with pytest.raises(CheckpointError, match="weights holds something else"):
        watch.check()


def test_a_worker_is_not_loaded_on_other_models(folder):
    study = read_study(make_study(folder))
    content = Watch(open_models(study)).content
    assemble.make_worker(study, open_models(study), CONFIG, content)
    replace(folder)
    with pytest.raises(CheckpointError, match="weights holds something else than where the study"):
        assemble.make_worker(study, open_models(study), CONFIG, content)


CODE = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from tests import test_watch

calls = 0

def score(model, task, examples):
    global calls
    calls += 1
    if calls == {at}:
        test_watch.{change}(pathlib.Path({folder!r}))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight").flatten()
    return [float(weight[example]) for example in examples]
"""


@pytest.fixture
def run_changing(folder, request):
    """Run a study whose function changes a file at one of its calls; return the calls made."""

    def run(change, at, name):
        module = f"{request.node.name.partition('[')[0]}_{change.__name__}_{name}"
        tests = str(request.config.rootpath)
        code = CODE.format(tests=tests, at=at, change=change.__name__, folder=str(folder))
        (folder / f"{module}.py").write_text(code)
        function = {"evaluator": "function", "function": f"{module}:score", "n_examples": 40}
        file = make_study(folder, tasks={"own": {**function, "select": 24, "hold_out": 16}})
        run_study(read_study(file), CONFIG, folder / name, Recorder())
        return sys.modules[module].calls

    return run


@pytest.mark.parametrize("change", [replace, write_over], ids=lambda change: change.__name__)
def test_a_run_stops_at_the_first_merge_of_changed_models(folder, run_changing, change):
    with pytest.raises(CheckpointError, match=CHANGES[change]):
        run_changing(change, 30, "run")
    assert read_status(folder / "run")["trials"]["complete"] > 0
    assert not (folder / "run" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_ends_refused_whenever_a_model_changes(folder, run_changing, change, models):
    n_calls = run_changing(change, 10**6, "unchanged")
    assert (folder / "unchanged" / "model" / "model.safetensors").exists()
    for at in (1, n_calls // 2, n_calls - 1, n_calls):
        name = f"run{at}"
        with pytest.raises(CheckpointError, match=rf"{CHANGES[change]}|first/.*: cannot be read"):
            run_changing(change, at, name)
        assert not (folder / name / "model").exists()
        for each in ("base", "first"):
            shutil.rmtree(folder / each)
            shutil.copytree(models / each, folder / each)

"""What guards a resume changes with all that may change a score, and with nothing else."""

import json
import os
import shutil

import pytest

from searchmerge.errors import SpecError
from searchmerge.fingerprint import fingerprint, versions
from searchmerge.merging.method import METHODS
from searchmerge.models import open_models
from searchmerge.study import read_study
from searchmerge.watch import content_of
from tests.tiny import make_study


@pytest.fixture
def taken(models, tmp_path):
    """Return the fingerprint of a study on links to the models."""
    for name in ("base", "first", "second"):
        (tmp_path / name).symlink_to(models / name)

    def taken(device="cpu", **changes):
        study = read_study(make_study(tmp_path, **changes))
        return fingerprint(study, content_of(open_models(study)), device)

    return taken


def differs(one, other):
    assert one.keys() == other.keys()
    return {key for key in one if one[key] != other[key]}


def test_a_study_read_again_is_the_same(taken):
    assert taken() == taken()
    assert differs(taken("cuda:0"), taken("cuda:1")) == set()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"confirm": {"top_k": 1, "n_resamples": 200}}, set()),
        ({"dtype": "bfloat16"}, {"study"}),
        ({"space": {"method": "ties", "coefficient": {"low": 0.0, "high": 1.5}}}, {"space"}),
        ({"experts": {"first": "second", "second": "first"}}, {"checkpoints"}),
    ],
)
def test_each_change_is_seen_where_it_was_made(taken, changes, parts):
    assert parts <= differs(taken(), taken(**changes))
    assert bool(parts) == bool(differs(taken(), taken(**changes)))


def test_a_changed_task_file_or_device_is_seen(taken, tmp_path):
    before = taken()
    assert differs(before, taken("cuda")) == {"device"}
    file = tmp_path / "tasks" / "third.yaml"
    file.write_text("task: third\n")
    assert differs(before, taken()) == {"files"}
    file.unlink()
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "helpers.pyc").write_bytes(b"\0")
    assert differs(before, taken()) == set()


@pytest.fixture
def copied(models, tmp_path):
    """Copy the models, so that a test may change them."""
    for name in ("base", "first", "second"):
        shutil.copytree(models / name, tmp_path / name)

    def taken(**changes):
        study = read_study(make_study(tmp_path, **changes))
        return fingerprint(study, content_of(open_models(study)), "cpu")

    return taken


def test_every_file_beside_the_weights_that_decides_a_score_is_seen(copied, tmp_path):
    before = copied()
    for name, file, content in (
        ("base", "config.json", None),
        ("base", "generation_config.json", '{"temperature": 0.5}'),
        ("first", "tokenizer_config.json", None),
        ("base", "chat_template.jinja", "{{ messages }}"),
        ("second", "special_tokens_map.json", "{}"),
        ("base", "modeling_own.py", "own = 1"),
    ):
        path = tmp_path / name / file
        was = path.read_text() if path.exists() else None
        path.write_text(content or was.replace("{", "{ ", 1))
        now = copied()
        assert differs(before, now) == {"checkpoints"}, file
        assert differs(before["checkpoints"], now["checkpoints"]) == {name}
        path.unlink() if was is None else path.write_text(was)
    (tmp_path / "base" / "LICENSE").write_text("mine")
    (tmp_path / "base" / "README.md").write_text("mine")
    assert copied() == before


def test_a_changed_rms_norm_eps_of_all_models_is_seen(copied, tmp_path):
    before = copied()
    for name in ("base", "first", "second"):
        file = tmp_path / name / "config.json"
        stamp = file.stat()
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert differs(before, copied()) == {"checkpoints"}


def test_weights_that_a_copy_with_times_replaces_are_seen(copied, tmp_path):
    before = copied()
    file = tmp_path / "first" / "model.safetensors"
    stamp = file.stat()
    shutil.copyfile(tmp_path / "second" / "model.safetensors", file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert differs(before, copied()) == {"checkpoints"}


def test_modules_beside_the_study_and_data_elsewhere_are_seen(taken, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text('{"question": "w1"}\n')
    (elsewhere / "shared.yaml").write_text(
        "dataset_path: json\ndataset_kwargs: {data_files: {validation: 'row*.jsonl'}}\n"
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ninclude: ../elsewhere/shared.yaml\n"
    )
    (tmp_path / "helpers.py").write_text("x = 1\n")
    before = taken()
    for file in ("helpers.py", "elsewhere/rows.jsonl", "elsewhere/shared.yaml"):
        path = tmp_path / file
        was = path.read_text()
        path.write_text(was + "\n")
        assert differs(before, taken()) == {"files"}, file
        path.write_text(was)
    assert taken() == before
    inline = {
        "task": "x",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": "elsewhere/rows.jsonl"},
    }
    tasks = {"t": {"task": inline, "split": "train"}}
    before = taken(tasks=tasks)
    (elsewhere / "rows.jsonl").write_text("{}\n")
    assert differs(before, taken(tasks=tasks)) == {"files"}


def test_versions_are_those_of_what_scores(taken, tmp_path):
    found = taken()["versions"]
    assert {"searchmerge", "torch", "transformers", "lm-eval"} <= found.keys()
    texts = {"t": {"evaluator": "perplexity", "data": "texts.txt"}}
    assert "lm-eval" not in taken(tasks=texts)["versions"]


def test_other_published_settings_are_seen(taken, monkeypatch):
    before = taken()
    assert {"base", "expert first", "TIES", "TSV-M"} <= before["references"].keys()
    monkeypatch.setattr(METHODS["tsv"], "published", None)
    now = taken()
    assert differs(before, now) == {"references"}
    assert before["references"].keys() - now["references"].keys() == {"TSV-M"}


def test_a_package_that_is_needed_and_missing_is_named(tmp_path):
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError:
        file = make_study(tmp_path, lm_harness={"include_path": "tasks", "engine": "vllm"})
        with pytest.raises(SpecError, match=r"the package vllm is needed and not installed: pip"):
            versions(read_study(file))
    else:
        pytest.skip("vllm is installed")

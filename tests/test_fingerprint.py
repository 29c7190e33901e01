"""What guards a resume changes with all that may change a score, and with nothing else."""

import pytest

from searchmerge.errors import SpecError
from searchmerge.fingerprint import fingerprint, versions
from searchmerge.models import open_models
from searchmerge.study import read_study
from tests.tiny import make_models, make_study


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return root


@pytest.fixture
def taken(models, tmp_path):
    """Return the fingerprint of a study on links to the models."""
    for name in ("base", "first", "second"):
        (tmp_path / name).symlink_to(models / name)

    def taken(device="cpu", **changes):
        study = read_study(make_study(tmp_path, **changes))
        return fingerprint(study, open_models(study), device)

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
    assert differs(before, taken()) == {"task_files"}
    file.unlink()
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "helpers.pyc").write_bytes(b"\0")
    assert differs(before, taken()) == set()


def test_versions_are_those_of_what_scores(taken, tmp_path):
    found = taken()["versions"]
    assert {"searchmerge", "torch", "transformers", "lm-eval"} <= found.keys()
    texts = {"t": {"evaluator": "perplexity", "data": "texts.txt"}}
    assert "lm-eval" not in taken(tasks=texts)["versions"]


def test_a_package_that_is_needed_and_missing_is_named(tmp_path):
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError:
        file = make_study(tmp_path, lm_harness={"include_path": "tasks", "engine": "vllm"})
        with pytest.raises(SpecError, match=r"the package vllm is needed and not installed: pip"):
            versions(read_study(file))
    else:
        pytest.skip("vllm is installed")

"""A study is its file, and where that is."""

import pytest
import yaml

from searchmerge.errors import SpecError
from searchmerge.study import plain_study, read_study

STUDY = {
    "base": "base",
    "experts": {"math": "m", "code": "c"},
    "space": {"method": "ties", "coefficient": {"low": 0.0, "high": 2.0}},
    "tasks": {"t": {"split": "train", "expert": "code"}, "u": {"split": "train"}},
    "search": {"n_trials": 30},
}


@pytest.fixture
def write(tmp_path):
    def write(file="study.yaml", **changes):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize(
    ("file", "changes", "name"),
    [
        ("wine/study.yaml", {}, "wine"),
        ("wine/large.yaml", {}, "large"),
        ("wine/study.yaml", {"name": "beer"}, "beer"),
    ],
)
def test_a_study_is_called_by_itself_its_folder_or_its_file(write, file, changes, name):
    assert read_study(write(file, **changes)).name == name


def test_a_folder_means_the_study_in_it(write, tmp_path):
    write("wine/study.yaml")
    study = read_study(tmp_path / "wine")
    assert study.file == tmp_path / "wine" / "study.yaml"
    assert study.folder == tmp_path / "wine"
    with pytest.raises(SpecError, match=r"study\.yaml: cannot be read"):
        read_study(tmp_path)


def test_experts_stand_in_the_order_of_the_file(write):
    study = read_study(write())
    assert study.experts == ("math", "code")
    assert study.task_experts == {"t": "expert code"}


def test_paths_beside_the_file_are_found_from_anywhere(write, tmp_path, monkeypatch):
    study = read_study(write("wine/study.yaml"))
    (tmp_path / "wine" / "data").mkdir()
    assert study.resolve("data") == str(tmp_path / "wine" / "data")
    assert study.resolve("org/data") == "org/data"
    monkeypatch.chdir(tmp_path)
    relative = read_study(tmp_path / "wine" / "study.yaml").elsewhere()
    monkeypatch.chdir("/")
    assert relative.resolve("data") == str(tmp_path / "wine" / "data")


def test_a_space_that_is_spent_on_references_is_refused(write):
    with pytest.raises(SpecError, match=r"search\.n_trials is 1, and as many trials go to refer"):
        read_study(write(search={"n_trials": 1}))


def test_a_single_merge_needs_models_alone():
    study = plain_study("base", {"a": "x", "b": "y"}, {"dtype": "bfloat16"})
    assert study.experts == ("a", "b")
    assert study.spec.dtype == "bfloat16"
    with pytest.raises(SpecError, match=r"dtype: .*found 'fp8'"):
        plain_study("base", {"a": "x"}, {"dtype": "fp8"})

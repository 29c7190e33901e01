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


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"tasks": {"t": {"split": "train", "expert": "cod"}}},
            "expert:",
            r"tasks\.t\.expert is 'cod'; experts are: math, code",
        ),
        (
            {"constraints": [{"tasks": ["t"], "at_least": 1}, {"tasks": ["x"], "at_least": 1}]},
            "- x",
            r"constraints\.1\.tasks: no task 'x'",
        ),
        ({"search": {"seed": 1}}, "search:", r"search: give n_trials, timeout, or both"),
        ({"tokenizer": "maths"}, "tokenizer:", r"tokenizer is 'maths'; choose base or an expert"),
        ({"space": {"method": "tis"}}, "space:", r"space: no merge method named 'tis'"),
        ({"space": [{"method": "ties"}, {"method": "tis"}]}, "method: tis", r"space\.1: no merge"),
        ({"search": {"n_trials": 9, "sampler": "x"}}, "sampler:", r"search\.sampler: no sampler"),
        ({"search": {"n_trials": 1}}, "n_trials:", r"search\.n_trials is 1, and as many"),
    ],
)
def test_an_error_of_several_keys_names_the_line_of_the_one_that_it_names(
    write, changes, key, message
):
    file = write(**changes)
    [line] = [i for i, text in enumerate(file.read_text().splitlines(), 1) if key in text][-1:]
    line -= key == "- x"  # the list itself stands a line above
    with pytest.raises(SpecError, match=rf"^{file}:{line}: {message}"):
        read_study(file)


def test_an_error_of_a_key_that_was_overridden_names_no_line(write):
    file = write()
    with pytest.raises(SpecError, match=rf"^{file}: --set: tasks\.t\.expert is 'x'; experts"):
        read_study(file, {"tasks.t.expert": "x"})


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

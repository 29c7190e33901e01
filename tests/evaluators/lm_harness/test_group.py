"""Groups and tags of lm-eval's as one task: its own aggregates, member by member."""

import shutil

import pytest
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Member
from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import harness
from tests.evaluators.models import tiny_tokenizer


def theirs(groups, model, name):
    lm = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    loaded = TaskManager(include_path=str(groups), include_defaults=False).load([name])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    return evaluate(lm, loaded, bootstrap_iters=0)


@pytest.mark.parametrize("name", ["by_size", "alike"])
def test_the_whole_groups_score_is_lm_evals(groups, model, name):
    results = theirs(groups, model, name)
    evaluator = harness(groups, LmTask(name, "test", metric=("acc",)))
    info = evaluator.tasks["mine"]
    scores = evaluator.score(model, "mine", range(info.n_examples))
    start, total = 0, 0.0
    for member in info.members:
        values = scores[start : start + member.n_examples]
        mean = sum(values) / len(values)
        assert mean == pytest.approx(results["results"][member.name]["acc,none"])
        total += member.weight * mean
        start += member.n_examples
    assert total == pytest.approx(results["groups"][name]["acc,none"])


def test_weights_are_those_of_the_groups(groups):
    def members(name, **keys):
        return harness(groups, LmTask(name, "test", **keys)).tasks["mine"].members

    assert members("by_size") == (Member("small", 7, 7 / 17), Member("large", 10, 10 / 17))
    assert members("alike") == (Member("small", 7, 0.5), Member("large", 10, 0.5))
    assert members("pair") == (Member("large", 10, 0.5), Member("small", 7, 0.5))
    nested = members("nested")  # holds small twice, whose examples are no more for it
    assert [(m.name, m.n_examples) for m in nested] == [("small", 7), ("large", 10)]
    assert [m.weight for m in nested] == pytest.approx([3.5 / 17 + 0.5, 5 / 17])


def write_groups(folder, groups, named):
    """Write groups beside copies of those that there are; return their folder."""
    for file in groups.glob("*.yaml"):
        (folder / file.name).write_text(file.read_text())
    for name, content in named.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name} | content))
    return folder


def test_a_task_that_stands_in_a_group_twice_is_scored_once_or_refused(groups, tmp_path):
    folder = write_groups(
        tmp_path,
        groups,
        {
            "same": {"task": ["small", "small"]},
            "other": {"task": ["small", {"task": "small", "num_fewshot": 1}]},
        },
    )
    [member] = harness(folder, LmTask("same", "test")).tasks["mine"].members
    assert member == Member("small", 7, 1.0)
    message = r"tasks\.mine\.task: 'small' stands there twice, with other settings \(other; oth"
    with pytest.raises(SpecError, match=message):
        harness(folder, LmTask("other", "test"))


def test_a_group_may_aggregate_one_metric_and_not_itself(groups, tmp_path):
    members = {"task": ["small", "large"]}
    folder = write_groups(
        tmp_path,
        groups,
        {
            "one": members | {"aggregate_metric_list": {"metric": "acc", "weight_by_size": False}},
            "odd": members | {"aggregate_metric_list": ["acc"]},
            "round": {"task": ["small", {"group": "within", "task": ["round"]}]},
        },
    )
    weights = [m.weight for m in harness(folder, LmTask("one", "test")).tasks["mine"].members]
    assert weights == [0.5, 0.5]
    with pytest.raises(
        SpecError, match=r"'odd' has an aggregate_metric_list that is no list of m"
    ):
        harness(folder, LmTask("odd", "test"))
    with pytest.raises(SpecError, match="the group 'round' is a member of itself"):
        harness(folder, LmTask("round", "test"))


def test_examples_of_several_members_are_scored_in_the_order_asked(groups, model):
    evaluator = harness(groups, LmTask("by_size", "test"))
    whole = evaluator.score(model, "mine", range(17))
    order = [16, 0, 9, 3, 8]
    assert evaluator.score(model, "mine", order) == tuple(whole[e] for e in order)
    assert evaluator.prompts("mine", 7) == harness(groups, LmTask("large", "test")).prompts(
        "mine", 0
    )


def test_answers_of_a_group_are_its_members(groups, model):
    evaluator = harness(groups, LmTask("by_size", "test", metric=("acc", "acc_norm")))
    evaluator.score(model, "mine", [16, 0])
    last, first = evaluator.answers("mine", [16, 0])
    assert (last.example, first.example) == (16, 0)
    large = harness(groups, LmTask("large", "test", metric=("acc", "acc_norm")))
    large.score(model, "mine", [9])
    [alone] = large.answers("mine", [9])
    assert (last.question, last.said, last.metrics) == (alone.question, alone.said, alone.metrics)
    assert evaluator.tasks["mine"].other_metrics == ("acc_norm",)


def test_a_group_of_which_one_example_cannot_be_graded_has_no_grades(folder, model, tmp_path):
    for name, target in (("short", "fox"), ("long", "{{'word ' * 90}}")):
        config = yaml.safe_load((folder / "generate.yaml").read_text())
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {s: str(folder / f) for s, f in files.items()}
        config |= {"task": name, "doc_to_target": target}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    evaluator = harness(
        write_groups(tmp_path, tmp_path, {"two": {"task": ["short", "long"]}}),
        LmTask("two", "test"),
    )
    evaluator.score(model, "mine", range(14))
    assert len(evaluator.grades("mine", range(7))) == 7
    assert evaluator.grades("mine", range(14)) == ()


def test_members_may_have_splits_of_their_own(groups):
    split = {"large": "validation", "rest": "test"}
    evaluator = harness(groups, LmTask("by_size", split))
    assert [member.n_examples for member in evaluator.tasks["mine"].members] == [7, 7]
    split = {"inner": "validation", "by_size": "test"}
    evaluator = harness(groups, LmTask("nested", split))
    assert [member.n_examples for member in evaluator.tasks["mine"].members] == [7, 10, 10]
    with pytest.raises(SpecError, match=r"split: names none for 'small' \(it names: large\)"):
        harness(groups, LmTask("by_size", {"large": "test"}))


def test_a_member_that_does_not_exist_is_named(groups):
    with pytest.raises(SpecError, match=r"'largee', a member of 'broken',.*did you mean 'large'"):
        harness(groups, LmTask("broken", "test"))
    with pytest.raises(SpecError, match="'by_size' is a group of several tasks"):
        harness(groups, LmTask("by_size", "test", samples=(0, 1)))


@pytest.mark.parametrize("named", [{}, {"task": "riddles"}, {"task": "fewshot"}])
def test_a_study_may_define_its_task_itself(folder, model, named):
    config = yaml.safe_load((folder / "mc.yaml").read_text())
    del config["task"]
    evaluator = harness(folder, LmTask(config | named, "test"))
    expected = harness(folder, LmTask("mc", "test")).score(model, "mine", range(7))
    assert evaluator.score(model, "mine", range(7)) == expected


def test_a_definition_of_the_studys_takes_nothing_from_a_task_of_its_name(folder):
    config = {"task": "mc", "output_type": "multiple_choice"}
    with pytest.raises(SpecError, match="could not load its task 'mc'"):
        harness(folder, LmTask(config, "test"))


def test_a_definition_need_not_say_which_split_is_scored(folder):
    config = yaml.safe_load((folder / "mc.yaml").read_text())
    config |= {"task": "riddles", "test_split": None, "validation_split": None}
    assert harness(folder, LmTask(config, "train")).tasks["mine"].n_examples == 6
    message = (
        r"split: lm-eval's 'riddles' has no split 'trian' \(it has: test, train, validation\)$"
    )
    with pytest.raises(SpecError, match=message):
        harness(folder, LmTask(config, "trian"))


def test_the_loss_of_a_group_is_that_of_each_example(groups, model):
    group = harness(groups, LmTask("by_size", "test"))
    assert group.tasks["mine"].losses == ("labels", "entropy", "agreement")
    small, large = (harness(groups, LmTask(name, "test")) for name in ("small", "large"))
    with torch.no_grad():
        expected = [*small.loss(model, "mine", [6]), *large.loss(model, "mine", [9])]
        expected += small.loss(model, "mine", [0])
        torch.testing.assert_close(group.loss(model, "mine", [6, 16, 0]), torch.stack(expected))
        given = group.log_probabilities(model, "mine", [6, 16, 0])
        first, last = small.log_probabilities(model, "mine", [6, 0])
        [middle] = large.log_probabilities(model, "mine", [9])
    for of_group, alone in zip(given, (first, middle, last), strict=True):
        torch.testing.assert_close(of_group, alone)


def test_examples_of_members_that_have_no_answer_are_told_by_their_places_in_the_group(
    groups, tmp_path
):
    groups = shutil.copytree(groups, tmp_path / "groups")
    config = yaml.safe_load((groups / "large.yaml").read_text())
    config["doc_to_target"] = "{{'none' if question.endswith(' 3?') else answer}}"
    (groups / "large.yaml").write_text(yaml.safe_dump(config))
    large = harness(groups, LmTask("large", "test"), learns="labels").tasks["mine"]
    info = harness(groups, LmTask("by_size", "test"), learns="labels").tasks["mine"]
    n_small = harness(groups, LmTask("small", "test")).tasks["mine"].n_examples
    assert large.without_loss == (3,)
    assert info.without_loss == (n_small + 3,)
    assert info.losses == ("labels", "entropy", "agreement")

"""A task that selects by one split and is confirmed on another scores each as if it were alone."""

from dataclasses import replace

import pytest
import torch
import yaml

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.keys import LmTask, Samples
from searchmerge.evaluators.score_kind import Whole
from tests.evaluators.lm_harness.tasks import harness

APART = {"select": "validation", "hold_out": "test"}


@pytest.mark.parametrize(
    ("task", "metric"), [("mc", ("acc_norm", "acc")), ("mc", ("mcc",)), ("mc", ("brier_score",))]
)
def test_each_part_is_what_its_split_is_alone(folder, model, task, metric):
    apart = harness(folder, LmTask(task, APART, metric=metric))
    info = apart.tasks["mine"]
    start = 0
    for part, split in APART.items():
        alone = harness(folder, LmTask(task, split, metric=metric))
        its = alone.tasks["mine"]
        assert (info.parts[part].source, info.n_of(part)) == (f"split {split!r}", its.n_examples)
        assert replace(info, n_examples=its.n_examples, parts={}) == its
        examples = range(start, start + its.n_examples)
        expected = alone.score(model, "mine", range(its.n_examples))
        assert apart.score(model, "mine", examples) == expected
        assert len(expected) == (1 if its.kind == Whole() else its.n_examples)
        assert apart.prompts("mine", start + 3) == alone.prompts("mine", 3)
        assert torch.equal(apart.loss(model, "mine", [start + 3]), alone.loss(model, "mine", [3]))
        [chances] = apart.log_probabilities(model, "mine", [start + 3])
        assert torch.equal(chances, alone.log_probabilities(model, "mine", [3])[0])
        [document] = apart.parts("mine", [start + 3])
        assert document.documents == (3,)
        said = apart.answers("mine", [start + 3, start])
        assert [answer.example for answer in said] == [start + 3, start]
        assert [replace(answer, example=0) for answer in said] == [
            replace(answer, example=0) for answer in alone.answers("mine", [3, 0])
        ]
        start += its.n_examples
    assert info.n_examples == start


def test_a_group_has_its_members_in_each_split(groups, model):
    split = {"select": "validation", "hold_out": {"small": "test", "rest": "train"}}
    apart = harness(groups, LmTask("by_size", split))
    info = apart.tasks["mine"]
    sizes = {part: [len(e) for _, e in info.members_of(part)] for part in split}
    assert sizes == {"select": [10, 7], "hold_out": [7, 6]}
    assert info.parts["select"].source == "split 'validation'"
    assert info.parts["hold_out"].source == "split 'test', split 'train'"
    alone = harness(groups, LmTask("large", "train"))
    [(_, _), (large, examples)] = info.members_of("hold_out")
    assert (large.name, large.weight) == ("large", pytest.approx(6 / 13))
    assert apart.score(model, "mine", examples) == alone.score(model, "mine", range(6))


def test_samples_are_positions_in_the_split_of_their_part(folder, model):
    split, samples = {"select": "train", "hold_out": "test"}, Samples((5, 2), (6, 0, 1))
    apart = harness(folder, LmTask("fewshot", split, samples=samples))
    assert [apart.tasks["mine"].n_of(part) for part in APART] == [2, 3]
    alone = harness(folder, LmTask("fewshot", "test"))
    expected = alone.score(model, "mine", (6, 0, 1))
    assert apart.score(model, "mine", (2, 3, 4)) == expected
    of_one = harness(folder, LmTask("fewshot", "test", samples=Samples((3, 2), (6, 0, 1))))
    assert of_one.score(model, "mine", (2, 3, 4)) == expected
    assert [of_one.tasks["mine"].n_of(part) for part in APART] == [2, 3]
    assert [its.source for its in of_one.tasks["mine"].parts.values()] == [
        "2 samples of split 'test'",
        "3 samples of split 'test'",
    ]


def test_a_split_that_is_not_there_is_named(folder):
    with pytest.raises(SpecError, match=r"tasks\.mine\.split: lm-eval's 'mc' has no split 'dev'"):
        harness(folder, LmTask("mc", {"select": "test", "hold_out": "dev"}))
    with pytest.raises(SpecError, match=r"no position 7; the split 'test' has 7 examples"):
        harness(folder, LmTask("mc", APART, samples=Samples((9,), (7,))))


def test_an_example_that_would_be_in_both_parts_is_refused(folder, groups):
    some = {"select": {"small": "validation", "rest": "test"}, "hold_out": "test"}
    message = r"tasks\.mine\.split: select and hold_out share 10 examples of 'large', split 'test'"
    with pytest.raises(SpecError, match=message):
        harness(groups, LmTask("by_size", some))
    samples = Samples((0, 1, 2), (2, 3))
    of_one = {"select": {"mc": "test"}, "hold_out": "test"}
    with pytest.raises(SpecError, match=r"share 1 example of 'mc', split 'test'; name another"):
        harness(folder, LmTask("mc", of_one, samples=samples))


def test_examples_without_an_answer_are_told_by_their_places_among_those_of_both_parts(folder):
    task = {**yaml.safe_load((folder / "mc.yaml").read_text()), "task": "some"}
    task["doc_to_target"] = "{{'none' if question.endswith(' 3?') else answer}}"
    info = harness(folder, LmTask(task, APART), learns="labels").tasks["mine"]
    assert info.without_loss == (3, info.n_of("select") + 3)

"""Which tensors are an expert's own head, and what its classes are called."""

import pytest
import torch

from searchmerge.errors import SpecError
from searchmerge.evaluators.heads import ModelHead, PooledHead
from searchmerge.heads import class_names, expert_head, head_tensors, n_classes, saved_heads
from searchmerge.models import open_models
from searchmerge.study import read_study
from tests.evaluators.classifiers import (
    CLASSES,
    NAMES,
    make_experts,
    make_pooled_experts,
    text_tasks,
    write_study,
    write_texts,
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open studies of classifiers with heads of their own, or with linear layers."""
    roots = {}
    for name, make in (("own", make_experts), ("pooled", make_pooled_experts)):
        roots[name] = tmp_path_factory.mktemp(name)
        make(roots[name])
        write_texts(roots[name])

    def opened(name, **changes):
        study = read_study(write_study(roots[name], text_tasks(), **changes))
        return study, open_models(study)

    return opened


def test_what_the_base_does_not_have_is_an_experts_own(opened):
    study, models = opened("own")
    for expert, n in CLASSES.items():
        found = head_tensors(study, models, expert)
        assert {name: tuple(t.shape) for name, t in found.items()} == {
            "classifier.weight": (n, 16),
            "classifier.bias": (n,),
        }


@pytest.mark.parametrize(
    ("kind", "pooling", "head_class"), [("own", None, ModelHead), ("pooled", "mean", PooledHead)]
)
def test_a_head_comes_with_its_classes(opened, kind, pooling, head_class):
    section = {"classification": {"pooling": pooling}} if pooling else {}
    study, models = opened(kind, **section)
    found = {expert: expert_head(study, models, expert, pooling) for expert in CLASSES}
    assert {type(own.head) for own in found.values()} == {head_class}
    assert {expert: own.head.n_classes for expert, own in found.items()} == CLASSES
    expected = NAMES["first"] if kind == "own" else ()
    assert found["first"].labels == expected
    assert found["second"].labels == ()  # they are only numbered


def test_a_base_without_a_pooled_output_is_refused(opened):
    study, models = opened("own")
    with pytest.raises(SpecError, match=r"classification\.pooling: .* has no '\S+', which its po"):
        expert_head(study, models, "first", "pooler")


def test_an_expert_without_a_head_is_named(opened):
    study, models = opened("own")
    without = type(models)(models.base, {**models.experts, "third": models.base}, models.dtype)
    with pytest.raises(SpecError, match=r"experts\.third \(.*\) has no tensor 'classifier\.\w+'"):
        expert_head(study, without, "third", None)


def test_saved_heads_have_a_name_for_every_class(opened):
    study, models = opened("own")
    found = saved_heads(study, models)
    assert found.keys() == CLASSES.keys()
    assert found["first"].labels == NAMES["first"]
    assert found["second"].labels == tuple(f"LABEL_{i}" for i in range(4))
    assert {head.model_class for head in found.values()} == {"AutoModelForSequenceClassification"}
    weights = models.experts["first"].weights()
    for name, tensor in found["first"].tensors.items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(
    ("config", "n", "names"),
    [
        ({"id2label": {"1": "no", "0": "yes"}}, 2, ("yes", "no")),
        (
            {"id2label": {str(i): f"c{i}" for i in range(12)}},
            12,
            tuple(f"c{i}" for i in range(12)),
        ),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, 3, ()),
        ({"num_labels": 5}, 5, ()),
        ({}, 2, ()),
    ],
)
def test_classes_are_counted_and_named_by_the_configuration(config, n, names):
    assert n_classes(config) == n
    assert class_names(config) == names

"""Heads: how an encoder's output becomes one vector, and that one logit per class."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from searchmerge.errors import SpecError
from searchmerge.evaluators.heads import (
    PooledClassifier,
    PooledHead,
    model_head,
    pool,
    pooled_head,
)
from tests.evaluators.classifiers import BERT

STATES = torch.tensor(
    [[[1.0, -8.0], [3.0, 2.0], [50.0, 50.0]], [[0.0, 4.0], [2.0, 2.0], [4.0, 0]]]
)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
OUTPUTS = SimpleNamespace(last_hidden_state=STATES, pooler_output=torch.tensor([[7.0], [8.0]]))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[2.0, -3.0], [2.0, 2.0]]),
        ("max", [[3.0, 2.0], [4.0, 4.0]]),
        ("cls", [[1.0, -8.0], [0.0, 4.0]]),
        ("pooler", [[7.0], [8.0]]),
    ],
)
def test_tokens_that_are_padding_do_not_count(pooling, expected):
    assert pool(OUTPUTS, MASK, pooling).tolist() == expected


def test_without_a_mask_every_token_counts():
    assert pool(OUTPUTS, None, "mean").tolist() == [[18.0, pytest.approx(44 / 3)], [2.0, 2.0]]
    assert pool(OUTPUTS, None, "max").tolist() == [[50.0, 50.0], [4.0, 4.0]]


def test_means_are_taken_in_float32():
    states = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    states[0, 0] = 3.0
    found = pool(
        SimpleNamespace(last_hidden_state=states), torch.ones(1, 3000, dtype=torch.int64), "mean"
    )
    assert found.dtype == torch.bfloat16
    assert float(found) == 1.0


def encoder(kind=BertModel, **config):
    torch.manual_seed(0)
    return kind(BertConfig(**BERT, **config)).eval()


INPUTS = {
    "input_ids": torch.tensor([[4, 9, 8], [7, 5, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}


def test_a_pooled_head_is_a_linear_layer_whatever_its_tensors_are_called():
    weight, bias = torch.randn(3, 16), torch.randn(3)
    head = pooled_head({"out.b": bias, "out.w": weight}, "cls", "experts.x")
    assert head.n_classes == 3
    model = encoder()
    with torch.no_grad():
        states = model(**INPUTS).last_hidden_state[:, 0]
        expected = states @ weight.T + bias
        torch.testing.assert_close(head.logits(model, INPUTS), expected)


def test_a_pooled_head_without_a_bias_has_one_of_zeros():
    head = pooled_head({"w": torch.ones(4, 16)}, "mean", "experts.x")
    assert head.parameters["bias"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({}, "none"),
        ({"b": torch.ones(3)}, r"b \[3\]"),
        ({"w": torch.ones(3, 4), "v": torch.ones(2, 3)}, r"w \[3, 4\], v \[2, 3\]"),
        ({"w": torch.ones(3, 4), "b": torch.ones(2)}, r"w \[3, 4\], b \[2\]"),
        ({"w": torch.ones(3, 4), "s": torch.ones(())}, r"w \[3, 4\], s \[\]"),
        ({"w": torch.ones(1, 4), "a": torch.ones(1), "b": torch.ones(1)}, r"a \[1\], b \[1\]"),
    ],
)
def test_tensors_that_are_no_linear_layer_are_refused(tensors, found):
    message = rf"experts\.x needs a linear classification head: .*\(its private tensors: .*{found}"
    with pytest.raises(SpecError, match=message):
        pooled_head(tensors, "mean", "experts.x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(value):
    tensors = {"w": torch.full((2, 4), value)}
    with pytest.raises(SpecError, match=r"experts\.x: tensor 'w' holds NaN or inf"):
        pooled_head(tensors, "mean", "experts.x")
    with pytest.raises(SpecError, match=r"experts\.x: tensor 'w' holds NaN or inf"):
        model_head(tensors, {"w": "classifier.weight"}, 2, "experts.x")


def test_a_models_own_head_is_put_in_for_one_call_and_leaves_the_model_alone():
    model = encoder(BertForSequenceClassification, num_labels=3)
    other = {"c.w": torch.randn(5, 16), "c.b": torch.randn(5), "more": torch.ones(1)}
    needed = {"c.w": "classifier.weight", "c.b": "classifier.bias"}
    head = model_head(other, needed, 5, "experts.x")
    before = model.classifier.weight.clone()
    with torch.no_grad():
        pooled = model.bert(**INPUTS).pooler_output
        expected = pooled @ other["c.w"].T + other["c.b"]
        torch.testing.assert_close(head.logits(model, INPUTS), expected)
    assert torch.equal(model.classifier.weight, before)


def test_a_head_with_a_missing_tensor_is_refused_with_what_there_is():
    with pytest.raises(
        SpecError, match=r"experts\.x has no tensor 'c\.b' .*tensors: c\.w\); save"
    ):
        model_head({"c.w": torch.ones(2, 2)}, {"c.w": "w", "c.b": "b"}, 2, "experts.x")


def test_a_head_follows_the_model_to_its_dtype():
    head = PooledHead("cls", {"weight": torch.randn(3, 16), "bias": torch.zeros(3)})
    model = encoder()
    with torch.no_grad():
        single = head.logits(model, INPUTS)
        double = head.logits(model.double(), INPUTS)
        again = head.logits(model.float(), INPUTS)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, single)


def test_a_pooled_classifier_is_called_as_one_of_transformers():
    head = PooledHead("mean", {"weight": torch.randn(3, 16), "bias": torch.randn(3)})
    model = encoder()
    classifier = PooledClassifier(model, head, ("red", "green", "blue"))
    assert classifier.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert classifier.config.label2id["blue"] == 2
    assert model.config.id2label != classifier.config.id2label
    with torch.no_grad():
        found = classifier(**INPUTS).logits
        torch.testing.assert_close(found, head.logits(model, INPUTS))
    assert isinstance(classifier.classifier, nn.Linear)

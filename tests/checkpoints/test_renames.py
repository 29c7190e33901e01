"""Names of the same tensors in two checkpoints, told apart by a prefix."""

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertModel

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.renames import aligned, head_names

ENCODER = ["embeddings.weight", "encoder.0.weight", "pooler.weight"]
UNDER = ["bert.embeddings.weight", "bert.encoder.0.weight", "classifier.weight"]
TINY = BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
)


def test_a_prefix_more_or_less_is_found():
    assert aligned(UNDER, ENCODER) == {
        "bert.embeddings.weight": "embeddings.weight",
        "bert.encoder.0.weight": "encoder.0.weight",
        "classifier.weight": "classifier.weight",
    }
    assert aligned(ENCODER, UNDER) == {
        "embeddings.weight": "bert.embeddings.weight",
        "encoder.0.weight": "bert.encoder.0.weight",
        "pooler.weight": "pooler.weight",
    }


@pytest.mark.parametrize("names", [ENCODER, UNDER, ["x"], []])
def test_names_that_are_the_same_or_unlike_stay(names):
    assert aligned(names, names) == {name: name for name in names}
    assert aligned(names, ["other.thing"]) == {name: name for name in names}


def test_no_two_tensors_get_one_name():
    found = aligned(["bert.a", "bert.b", "b"], ["a", "b", "c"])
    assert len(set(found.values())) == 3
    assert found["b"] == "b"


def test_a_classifier_is_read_under_its_encoders_names(tmp_path):
    BertModel(TINY).save_pretrained(tmp_path / "base")
    BertForSequenceClassification(TINY).save_pretrained(tmp_path / "expert")
    base, expert = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "expert")
    found = expert.named_as(base)
    assert set(found.headers) == {*base.headers, "classifier.weight", "classifier.bias"}
    name = "encoder.layer.0.output.dense.weight"
    assert found.weights()[name].equal(expert.weights()["bert." + name])
    assert found.fingerprint() == expert.fingerprint()
    assert base.named_as(base) is base


def test_the_tensors_of_a_head_are_those_that_are_not_stored(tmp_path):
    model = BertModel(TINY)
    model.save_pretrained(tmp_path)
    stored = list(open_checkpoint(tmp_path).headers)
    found, kind = head_names(tmp_path, stored, "AutoModelForSequenceClassification")
    assert found == {name: name for name in ("classifier.weight", "classifier.bias")}
    assert kind == "BertForSequenceClassification"
    assert head_names(tmp_path, stored, "AutoModel")[0] == {}

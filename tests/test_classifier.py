"""A saved merge is a classifier again, with the head of any of its experts."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from searchmerge.classifier import SavedHead, class_of, head_files, load_classifier
from searchmerge.errors import CheckpointError
from tests.evaluators.classifiers import NAMES, make_experts, make_pooled_experts

SEQUENCES = "AutoModelForSequenceClassification"
INPUTS = {
    "input_ids": torch.tensor([[4, 9, 8], [7, 5, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    make_experts(root)
    make_pooled_experts(root / "pooled")
    return root


def head_of(folder, model_class=SEQUENCES, **how):
    base = load_file(folder.parent / "base" / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    own = {n: t for n, t in tensors.items() if n.removeprefix("bert.") not in base}
    return SavedHead(own, model_class, **how)


@pytest.fixture
def saved(experts, tmp_path):
    """Save an expert's encoder with heads beside it; return its folder."""

    def saved(encoder, heads):
        out = tmp_path / "out"
        shutil.copytree(experts / encoder, out)
        for name, content in head_files(heads).items():
            file = out / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return out

    return saved


@torch.no_grad()
def test_an_encoder_with_its_own_head_is_the_expert_again(experts, saved):
    heads = {
        "first": head_of(experts / "first", labels=NAMES["first"]),
        "second": head_of(experts / "second", labels=tuple("abcd")),
    }
    out = saved("first", heads)
    expert = AutoModelForSequenceClassification.from_pretrained(experts / "first").eval()
    classifier = load_classifier(out, "first")
    assert not classifier.training
    assert classifier.config.id2label == dict(enumerate(NAMES["first"]))
    torch.testing.assert_close(classifier(**INPUTS).logits, expert(**INPUTS).logits)
    other = load_classifier(out, "second")
    assert other(**INPUTS).logits.shape == (2, 4)
    assert other.config.id2label[3] == "d"


@torch.no_grad()
def test_a_linear_head_is_put_on_the_pooled_output(experts, saved):
    head = head_of(experts / "pooled" / "first", "AutoModel", pooling="cls", labels=tuple("abc"))
    out = saved("pooled/first", {"first": head})
    found = load_classifier(out, "first")(**INPUTS).logits
    states = AutoModel.from_pretrained(out).eval()(**INPUTS).last_hidden_state[:, 0]
    weight, bias = head.tensors["classifier.weight"], head.tensors["classifier.bias"]
    torch.testing.assert_close(found, states @ weight.T + bias)


@pytest.mark.parametrize("padding", [None, 5])
@torch.no_grad()
def test_a_decoder_classifies_the_last_token_of_each_text_of_a_batch(padding, tmp_path):
    make_experts(tmp_path, "llama")
    out, head = tmp_path / "base", head_of(tmp_path / "first", labels=NAMES["first"])
    score = load_file(tmp_path / "first" / "model.safetensors")["score.weight"]
    for name, content in head_files(
        {"first": replace(head, tensors={"score.weight": score})}
    ).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"pad_token_id": padding}))
    classifier = load_classifier(out, "first")
    assert classifier.config.pad_token_id == (0 if padding is None else padding)
    texts = [torch.tensor([[4, 9, 8]]), torch.tensor([[7, 6]])]
    alone = torch.cat([classifier(input_ids=text).logits for text in texts])
    for filler in (0, 5, 11):  # the tokenizer pads with 0
        batch = torch.tensor([[4, 9, 8], [7, 6, filler]])
        logits = classifier(input_ids=batch, attention_mask=INPUTS["attention_mask"]).logits
        torch.testing.assert_close(logits, alone)
    assert not torch.allclose(classifier(input_ids=torch.tensor([[7, 6, 11]])).logits, alone[1])


def test_files_hold_tensors_in_the_asked_dtype_and_how_they_are_used():
    tensors = {"w": torch.ones(2, 3).t(), "ids": torch.tensor([1])}
    files = head_files(
        {"a/b": SavedHead(tensors, SEQUENCES, "mean", ("no", "yes"))}, torch.bfloat16
    )
    assert list(files) == ["heads/a%2Fb.safetensors", "heads/a%2Fb.json"]
    assert json.loads(files["heads/a%2Fb.json"]) == {
        "expert": "a/b",
        "model_class": SEQUENCES,
        "pooling": "mean",
        "id2label": {"0": "no", "1": "yes"},
    }
    from safetensors.torch import load

    kept = load(files["heads/a%2Fb.safetensors"])
    assert kept["w"].dtype == torch.bfloat16
    assert kept["w"].shape == (3, 2)
    assert kept["ids"].dtype == torch.int64


def test_an_expert_without_a_head_is_refused_with_those_that_have_one(experts, saved):
    with pytest.raises(CheckpointError, match=r"no head of an expert 'x' \(there are: none\)"):
        load_classifier(experts / "first", "x")
    out = saved("first", {"first": head_of(experts / "first", labels=NAMES["first"])})
    with pytest.raises(CheckpointError, match=r"no head of an expert 'x' \(there are: first\)"):
        load_classifier(out, "x")
    (out / "heads" / "first.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"first\.safetensors: cannot be read"):
        load_classifier(out, "first")


def test_tensors_of_which_nothing_says_how_they_are_used_are_refused(experts, saved):
    out = saved("first", {"first": head_of(experts / "first", None)})
    with pytest.raises(
        CheckpointError,
        match=r"'first' has tensors \(classifier\.bias, classifier\.weight\), and nothing says",
    ):
        load_classifier(out, "first")


def test_a_head_of_another_shape_is_refused(experts, saved):
    head = head_of(experts / "first", labels=NAMES["first"])
    wide = {name: torch.ones(*t.shape[:-1], t.shape[-1] + 1) for name, t in head.tensors.items()}
    out = saved("first", {"first": SavedHead(wide, SEQUENCES, labels=NAMES["first"])})
    with pytest.raises(CheckpointError, match=r"'classifier\.\w+' has shape \[.*\]; the model ne"):
        load_classifier(out, "first")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, SEQUENCES),
        (
            {"architectures": ["ViTForImageClassification"]},
            "AutoModelForImageClassification",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["BertModel"]}, None),
        ({"architectures": []}, None),
        ({}, None),
    ],
)
def test_the_class_of_a_model_follows_from_its_configuration(config, expected):
    assert class_of(config) == expected

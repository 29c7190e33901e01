"""What experts have beyond their base: private heads, and what does not fit or does not matter."""

import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.compatibility import check_compatible
from searchmerge.checkpoints.heads import (
    beyond_base,
    exclude_patterns,
    private_tensors,
    unused_tensors,
)
from searchmerge.errors import CheckpointError
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors
from tests.checkpoints.conftest import ARCHITECTURES
from tests.checkpoints.merged import Merged, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def edit(tmp_path):
    """Return a function that changes the tensors of a saved copy of a model."""

    def edit(source, change, **config):
        folder = tmp_path / f"edited{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | config))
        return folder

    return edit


def add(**tensors):
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda stored: {**stored, **named}


def rename(*pairs):
    def change(stored):
        for old, new in pairs:
            stored = {re.sub(old, new, name): tensor for name, tensor in stored.items()}
        return stored

    return change


def refusal(base, expert, cache_dir, auto_class=None, **settings):
    base = open_checkpoint(base, cache_dir=cache_dir)
    expert = open_checkpoint(expert, base=base, cache_dir=cache_dir).named_as(base)
    with pytest.raises(CheckpointError) as caught:
        check_compatible(base, {"a": expert}, auto_class=auto_class, **settings)
    return str(caught.value)


def names(base, expert, cache_dir, auto_class=None):
    base = open_checkpoint(base, cache_dir=cache_dir)
    expert = open_checkpoint(expert, base=base, cache_dir=cache_dir).named_as(base)
    check_compatible(base, {"a": expert}, auto_class=auto_class)
    return set(private_tensors(base, expert, auto_class))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_hidden_layers": 4}),
        ("llama", {"attention_bias": True}),
        ("gpt2", {"n_layer": 4}),
        ("bert", {"num_hidden_layers": 3}),
        ("qwen3_moe", {"num_hidden_layers": 3}),
    ],
)
def test_more_of_the_model_itself_is_no_head(name, changes, save, cache_dir):
    differing = list(changes)
    told = refusal(save(name), save(name, 1, **changes), cache_dir, may_differ=differing)
    assert re.search(
        r"^expert 'a' \(.*\) has '.*' (and \d+ more )?in the model itself, which", told
    )
    assert "so it was not trained from it" in told
    assert "exclude" not in told


def test_a_tensor_that_no_class_knows_is_refused_until_it_is_excluded(save, edit, cache_dir):
    head = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    expert = edit(save("llama", 1), lambda stored: {**stored, **head})
    told = refusal(save("llama"), expert, cache_dir, CAUSAL)
    assert "has 'v_head.summary.bias' and 1 more, which the base" in told
    assert told.endswith(
        r"is no head of a class of transformers; leave it out with `exclude: ['^v_head\.']`"
    )
    base = open_checkpoint(save("llama"), cache_dir=cache_dir)
    opened = open_checkpoint(expert, cache_dir=cache_dir)
    patterns = [r"^v_head\."]
    check_compatible(base, {"a": opened}, exclude=patterns, auto_class=CAUSAL)
    vectors = TaskVectors.from_weights(
        base.weights(), {"a": opened.weights()}, exclude=patterns, tied={}
    )
    assert vectors.heads == {"a": {}}
    assert set(vectors.weights) == set(base.headers)


def test_an_embedding_that_the_base_lacks_is_refused(save, edit, cache_dir):
    expert = edit(save("llama", 1), add(model__embed_positions__weight=torch.ones(8, 16)))
    assert "has 'model.embed_positions.weight', which" in refusal(save("llama"), expert, cache_dir)


def test_a_classifiers_head_is_its_own_on_a_bare_base_and_on_a_language_model(
    save, tmp_path, cache_dir
):
    model = ARCHITECTURES["bert"].make()
    model.bert.save_pretrained(tmp_path / "bare")
    transformers.BertForMaskedLM(model.config).save_pretrained(tmp_path / "masked")
    head = {"classifier.weight", "classifier.bias"}
    assert names(tmp_path / "bare", save("bert", 1), cache_dir, CLASSIFIER) == head
    assert names(tmp_path / "bare", save("bert", 1), cache_dir, "AutoModel") == head
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert names(tmp_path / "masked", save("bert", 1), cache_dir, CLASSIFIER) == head | pooler


@pytest.mark.parametrize("auto_class", [CLASSIFIER, "AutoModel"])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_language_models_head_below_a_classifier_is_neither_needed_nor_merged(
    kind, auto_class, save, edit, tmp_path, cache_dir
):
    config = ARCHITECTURES["bert"].config
    model = transformers.BertForPreTraining(config)
    model.save_pretrained(tmp_path / "pretrained")
    pretrained = edit(tmp_path / "pretrained", lambda stored: stored, architectures=[kind])
    base = open_checkpoint(pretrained, cache_dir=cache_dir)
    unused = set(unused_tensors(base, auto_class))
    assert unused == {name for name in base.headers if name.startswith("cls.")}
    assert exclude_patterns(unused, base.headers) == [r"^cls\."]
    head = {"classifier.weight", "classifier.bias"}
    assert names(pretrained, save("bert", 1), cache_dir, auto_class) == head
    model.bert.save_pretrained(tmp_path / "bare")
    assert names(tmp_path / "bare", pretrained, cache_dir, auto_class) == set()


def test_a_pooler_that_a_class_does_not_use_is_not_needed(save, edit, cache_dir):
    token = "AutoModelForTokenClassification"
    without = edit(
        save("bert", 1),
        lambda stored: {n: t for n, t in stored.items() if "pooler" not in n},
        architectures=["BertForTokenClassification"],
    )
    assert names(save("bert"), without, cache_dir, token) == set()
    assert names(without, save("bert"), cache_dir, token) == set()
    told = refusal(save("bert"), without, cache_dir, CLASSIFIER)
    assert told.endswith(r"`exclude: ['^bert\.pooler\.']`")


def test_a_linear_layer_beside_a_bare_model_is_a_head_and_nothing_else_is(save, edit, cache_dir):
    def bare(stored):
        return {
            name.removeprefix("bert."): tensor
            for name, tensor in stored.items()
            if not name.startswith("classifier")
        }

    base = edit(save("bert"), bare, architectures=["BertModel"])
    layer = {"probe.weight": torch.ones(5, 16), "probe.bias": torch.ones(5)}
    good = edit(base, lambda stored: {**stored, **layer})
    assert names(base, good, cache_dir, "AutoModel") == set(layer)
    alone = edit(base, add(probe__weight=torch.ones(5, 16)))
    assert names(base, alone, cache_dir, "AutoModel") == {"probe.weight"}
    for wrong in (
        {"probe.weight": torch.ones(5, 16), "probe.bias": torch.ones(4)},
        {**layer, "probe.scale": torch.ones(5)},
        {"encoder.probe.weight": torch.ones(5, 16)},
        {"one.weight": torch.ones(5, 16), "two.bias": torch.ones(5)},
    ):
        expert = edit(base, lambda stored, wrong=wrong: {**stored, **wrong})
        assert "is no head of a class" in refusal(base, expert, cache_dir, "AutoModel")
    expert = edit(save("llama", 1), lambda stored: {**stored, **layer})
    assert "is no head of a class" in refusal(save("llama"), expert, cache_dir, CAUSAL)


def test_an_adapters_saved_head_is_its_own(save, tmp_path, cache_dir):
    model = peft.get_peft_model(
        ARCHITECTURES["bert"].make(),
        peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    )
    model.save_pretrained(tmp_path / "adapter")
    ARCHITECTURES["bert"].make().bert.save_pretrained(tmp_path / "bare")
    head = {"classifier.weight", "classifier.bias"}
    for auto_class in (CLASSIFIER, "AutoModel"):
        assert names(tmp_path / "bare", tmp_path / "adapter", cache_dir, auto_class) == head


_BUFFERS = {
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "bert": {"bert.embeddings.position_ids": torch.arange(8)[None]},
}


@pytest.mark.parametrize("name", _BUFFERS)
@pytest.mark.parametrize("owner", ["base", "expert"])
def test_buffers_of_older_versions_are_in_nobodys_way(
    owner, name, save, edit, tmp_path, cache_dir
):
    with_buffers = edit(save(name, owner == "expert"), lambda t: {**t, **_BUFFERS[name]})
    base, expert = save(name), save(name, 1)
    base, expert = (with_buffers, expert) if owner == "base" else (base, with_buffers)
    auto_class = ARCHITECTURES[name].auto_class
    expected = getattr(transformers, auto_class).from_pretrained(save(name, 1))
    merged = Merged(base, {"a": expert}, cache_dir, auto_class)
    assert not _BUFFERS[name].keys() & merged.vectors.weights.keys()
    merged.check(default_plan("linear", ["a"]), logits(expected), tmp_path / "out")


def test_a_bias_that_is_named_as_a_buffer_is_not_taken_for_one(save, edit, cache_dir):
    expert = edit(save("llama", 1), add(model__layers__0__self_attn__bias=torch.ones(16)))
    assert "has 'model.layers.0.self_attn.bias', which" in refusal(
        save("llama"), expert, cache_dir
    )


_OLD = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))


@pytest.mark.parametrize("old", ["base", "expert", "both"])
def test_norms_are_merged_under_the_names_of_either_generation(
    old, save, edit, tmp_path, cache_dir
):
    base, expert = save("bert"), save("bert", 1)
    expected = logits(transformers.BertForSequenceClassification.from_pretrained(expert))
    base = base if old == "expert" else edit(base, rename(*_OLD))
    expert = expert if old == "base" else edit(expert, rename(*_OLD))
    merged = Merged(base, {"a": expert}, cache_dir, CLASSIFIER)
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("LayerNorm.gamma") for name in stored) == (old != "expert")


def test_a_proposed_pattern_matches_nothing_but_what_it_is_for():
    layers = [f"h.{i}.attn.{kind}" for i in range(3) for kind in ("bias", "c_attn.bias")]
    buffers = [name for name in layers if "c_attn" not in name]
    assert exclude_patterns(buffers, layers) == [r"^h\.\d+\.attn\.bias$"]
    assert exclude_patterns(buffers[:2], layers) == [r"^h\.0\.attn\.bias$", r"^h\.1\.attn\.bias$"]
    assert exclude_patterns(["cls.a.w", "cls.b.w"], ["x.w"]) == [r"^cls\."]
    assert exclude_patterns([], layers) == []


def test_models_of_one_kind_have_nothing_beyond_each_other(opened):
    for name, architecture in ARCHITECTURES.items():
        found = beyond_base(opened(name), opened(name, 1), architecture.auto_class)
        assert not any(found)
        assert unused_tensors(opened(name), architecture.auto_class) == ()

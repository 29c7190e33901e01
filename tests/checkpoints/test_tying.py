"""Experts of a tied base that have an output embedding of their own, against PEFT itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint, tied
from searchmerge.checkpoints.compatibility import check_compatible
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.task_vectors import TaskVectors
from tests.checkpoints.conftest import ARCHITECTURES, Architecture
from tests.checkpoints.merged import ATOL, Merged, logits, opened_together

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]

_FAMILIES = {
    "llama_tied": ("q_proj", "embed_tokens"),
    "qwen2_tied": ("q_proj", "embed_tokens"),
    "gemma": ("q_proj", "embed_tokens"),
    "gpt2": ("c_attn", "wte"),
}
"""Each tied family with a layer of it, and its input embedding."""

_ROUTES = {
    "head_saved": lambda layer, embedding: {
        "target_modules": [layer],
        "modules_to_save": ["lm_head"],
    },
    "both_saved": lambda layer, embedding: {
        "target_modules": [layer],
        "modules_to_save": [embedding, "lm_head"],
    },
    "embedding_saved": lambda layer, embedding: {
        "target_modules": [layer],
        "modules_to_save": [embedding],
    },
    "embedding_lora": lambda layer, embedding: {"target_modules": [layer, embedding]},
    "head_lora": lambda layer, embedding: {"target_modules": [layer, "lm_head"]},
    "both_lora": lambda layer, embedding: {"target_modules": [layer, embedding, "lm_head"]},
}
_NOT_WHOLE = ("breadcrumbs", "iso_c", "pcb")
"""Methods that change a single expert's task vector, whatever their hyper-parameters."""


def whole_expert(method, name):
    """Return the plan of a method that takes all of one expert's task vector, once."""
    plan = default_plan(method, [name])
    values = dict.fromkeys(plan.values, ((1.0,),))
    return replace(plan, values=values)


def train(name, directory, **settings):
    """Save a LoRA adapter with random weights; return the logits of PEFT's own forward pass."""
    model = peft.get_peft_model(
        ARCHITECTURES[name].make(), peft.LoraConfig(r=2, lora_alpha=4, **settings)
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    loaded = peft.PeftModel.from_pretrained(ARCHITECTURES[name].make(), directory)
    return logits(loaded, name)


def fine_tune(save, directory, name="llama_tied", *, says_tied=True):
    """Save a whole model with another head than its embedding; return its logits."""
    shutil.copytree(save(name, 1), directory)
    file = directory / "model.safetensors"
    stored = load_file(file)
    shape = next(t.shape for n, t in stored.items() if t.ndim == 2 and len(t) == 64)
    stored["lm_head.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    if not says_tied:
        config["tie_word_embeddings"] = False
        (directory / "config.json").write_text(json.dumps(config))
    loader = getattr(transformers, ARCHITECTURES[name].auto_class)
    return logits(loader.from_pretrained(directory), name)


@pytest.mark.parametrize("name", _FAMILIES)
@pytest.mark.parametrize("route", _ROUTES)
def test_an_adapter_that_unties_a_base_is_scored_and_saved_as_peft_runs_it(
    name, route, save, tmp_path, cache_dir
):
    expected = train(name, tmp_path / "a", **_ROUTES[route](*_FAMILIES[name]))
    merged = Merged(save(name), {"a": tmp_path / "a"}, cache_dir)
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )


@pytest.mark.parametrize("layers", ["modules_to_save", "target_modules"])
def test_an_adapter_that_keeps_embeddings_tied_is_exact(layers, save, tmp_path, cache_dir):
    settings = {"target_modules": ["q_proj"], layers: ["embed_tokens", "lm_head"]}
    expected = train("llama_tied", tmp_path / "a", ensure_weight_tying=True, **settings)
    merged = Merged(save("llama_tied"), {"a": tmp_path / "a"}, cache_dir)
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out")


@pytest.mark.parametrize("says_tied", [True, False])
@pytest.mark.parametrize("name", _FAMILIES)
def test_a_fine_tuned_model_that_stores_another_head_keeps_it(
    name, says_tied, save, tmp_path, cache_dir
):
    expected = fine_tune(save, tmp_path / "a", name, says_tied=says_tied)
    merged = Merged(save(name), {"a": tmp_path / "a"}, cache_dir)
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out")


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_each_expert_whether_it_ties_its_embeddings_or_not(
    method, save, tmp_path, cache_dir
):
    expected = {
        "whole": fine_tune(save, tmp_path / "whole"),
        "adapter": train("llama_tied", tmp_path / "adapter", target_modules=["embed_tokens"]),
        "plain": train("llama_tied", tmp_path / "plain", target_modules=["q_proj"]),
        "tied": logits(transformers.AutoModelForCausalLM.from_pretrained(save("llama_tied", 3))),
    }
    folders = {name: tmp_path / name for name in ("whole", "adapter", "plain")}
    merged = Merged(save("llama_tied"), folders | {"tied": save("llama_tied", 3)}, cache_dir)
    for name in expected:
        plan = whole_expert(method, name)
        found = merged.logits(plan)
        assert torch.isfinite(found).all()
        if method not in _NOT_WHOLE:
            torch.testing.assert_close(found, expected[name], atol=5e-5, rtol=0)
    together = default_plan(method, list(expected))
    found = merged.logits(together)
    saved = merged.saved(together, tmp_path / "out")
    torch.testing.assert_close(saved, found, atol=ATOL, rtol=0)


@pytest.mark.parametrize("route", ["head_saved", "head_lora"])
def test_an_encoder_decoders_head_is_untied_without_its_other_embeddings(
    route, save, tmp_path, cache_dir
):
    expected = train("t5", tmp_path / "a", **_ROUTES[route]("q", "shared"))
    merged = Merged(save("t5"), {"a": tmp_path / "a"}, cache_dir, "AutoModelForSeq2SeqLM")
    assert "encoder.embed_tokens.weight" not in merged.base.headers
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out", "t5")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((save("t5") / "config.json").read_text())


def test_a_whole_encoder_decoder_keeps_its_own_head(save, tmp_path, cache_dir):
    expected = fine_tune(save, tmp_path / "a", "t5")
    merged = Merged(save("t5"), {"a": tmp_path / "a"}, cache_dir, "AutoModelForSeq2SeqLM")
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out", "t5")


def test_models_that_all_tie_their_embeddings_stay_as_they_are(save, tmp_path, cache_dir):
    shutil.copytree(save("llama_tied", 1), tmp_path / "twice")
    file = tmp_path / "twice" / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    train("llama_tied", tmp_path / "plain", target_modules=["q_proj"])
    folders = {name: tmp_path / name for name in ("twice", "plain")}
    merged = Merged(save("llama_tied"), folders, cache_dir)
    assert "lm_head.weight" not in {*merged.base.headers, *merged.vectors.weights}
    head = merged.model.get_output_embeddings().weight
    assert head is merged.model.get_input_embeddings().weight
    merged.saved(default_plan("linear", ["twice"]), tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    assert config == (save("llama_tied") / "config.json").read_text()


def test_a_base_with_a_head_of_its_own_takes_experts_that_tie_theirs(save, tmp_path, cache_dir):
    fine_tune(save, tmp_path / "base")
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(save("llama_tied", 3)))
    for says_tied in (True, False):
        base = tmp_path / f"base {says_tied}"
        fine_tune(save, base, says_tied=says_tied)
        merged = Merged(base, {"a": save("llama_tied", 3)}, cache_dir)
        merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out" / base.name)


def test_a_head_that_is_excluded_stays_the_bases(save, tmp_path, cache_dir):
    fine_tune(save, tmp_path / "a")
    base, experts = opened_together(
        save("llama_tied"), {"a": tmp_path / "a"}, cache_dir, "AutoModelForCausalLM"
    )
    check_compatible(base, experts, exclude=["^lm_head"])
    model = load_resident(base, dtype=torch.float32, device="cpu")
    vectors = TaskVectors.from_weights(
        base.weights(), {"a": experts["a"].weights()}, exclude=["^lm_head"], tied=tied(base)
    )
    before = base.weights()["model.embed_tokens.weight"]
    Merger(vectors, targets=writable_views(model), engine="eager").apply(
        default_plan("linear", ["a"])
    )
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.model.embed_tokens.weight, before)


def test_an_untied_model_has_the_fingerprint_of_its_files(save, tmp_path, cache_dir):
    fine_tune(save, tmp_path / "a")
    plain = open_checkpoint(Path(save("llama_tied")), cache_dir=cache_dir)
    base, _ = opened_together(
        save("llama_tied"), {"a": tmp_path / "a"}, cache_dir, "AutoModelForCausalLM"
    )
    assert base.fingerprint() == plain.fingerprint()
    assert base.headers.keys() - plain.headers.keys() == {"lm_head.weight"}


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_OTHER_NAMES = {
    "mamba": Architecture(
        transformers.MambaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, use_mambapy=True
        )
    ),
    "roberta": Architecture(transformers.RobertaConfig(**_SMALL), "AutoModelForMaskedLM"),
    "modernbert": Architecture(
        transformers.ModernBertConfig(**_SMALL, pad_token_id=0), "AutoModelForMaskedLM"
    ),
    "electra": Architecture(
        transformers.ElectraConfig(**_SMALL, embedding_size=8), "AutoModelForMaskedLM"
    ),
}
"""Tied models whose embeddings have names of their own, and output embeddings a bias."""


@pytest.mark.parametrize("name", _OTHER_NAMES)
@pytest.mark.parametrize("half", ["get_input_embeddings", "get_output_embeddings"])
def test_an_adapter_unties_embeddings_whatever_their_names(
    name, half, monkeypatch, tmp_path, cache_dir
):
    monkeypatch.setitem(ARCHITECTURES, name, _OTHER_NAMES[name])
    model = ARCHITECTURES[name].make()
    model.save_pretrained(tmp_path / "base")
    changed = getattr(model, half)()
    layer = next(key for key, module in model.named_modules() if module is changed)
    expected = train(name, tmp_path / "a", target_modules=[layer])
    merged = Merged(
        tmp_path / "base", {"a": tmp_path / "a"}, cache_dir, ARCHITECTURES[name].auto_class
    )
    merged.check(default_plan("linear", ["a"]), expected, tmp_path / "out")


@pytest.mark.parametrize("name", ["roberta", "modernbert", "electra"])
@pytest.mark.parametrize("untied", ["base", "expert"])
def test_a_masked_model_and_one_with_a_head_of_its_own_are_merged(
    name, untied, tmp_path, cache_dir
):
    made = {}
    for seed, role in enumerate(("base", "expert")):
        made[role] = _OTHER_NAMES[name].make(seed, tie_word_embeddings=role != untied)
        made[role].save_pretrained(tmp_path / role)
    merged = Merged(
        tmp_path / "base", {"a": tmp_path / "expert"}, cache_dir, "AutoModelForMaskedLM"
    )
    merged.check(default_plan("linear", ["a"]), logits(made["expert"]), tmp_path / "out")

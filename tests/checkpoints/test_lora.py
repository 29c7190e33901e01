import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES

# PEFT 0.21 asks transformers 5 for an attribute that has been renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

_LINEAR = ["q_proj", "v_proj", "down_proj"]


def train(name, directory, *, dtype=torch.float32, spread=None, **settings):
    """Save a LoRA adapter with random factors, or moved by ``spread``; return it in PEFT."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR} | settings
    base = ARCHITECTURES[name].make().to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and spread is None:
                parameter.normal_()
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    model.save_pretrained(directory)
    return model


def merged(model):
    """Return the merged weights under the names that a checkpoint has."""
    return writable_views(model.merge_and_unload())


@pytest.fixture
def edit(tmp_path):
    """Return a function that saves an adapter whose configuration and tensors are changed."""

    def edit(change=None, retensor=None, **settings):
        directory = tmp_path / "adapter"
        if not directory.exists():
            train("llama", directory, **settings)
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | (change or {})))
        if retensor:
            file = directory / "adapter_model.safetensors"
            save_file(retensor(load_file(file)), file)
        return directory

    return edit


_CASES = {
    "plain": ("llama", {}),
    "rank_stabilised": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.down_proj": 3},
         "alpha_pattern": {"layers.0.self_attn.v_proj": 32, "down_proj": 1}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "tied_model": ("llama_tied", {}),
    "encoder_decoder": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "renamed": ("vit", {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "untied_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "square_in_conv1d": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "square_in_linear": ("llama", {"target_modules": ["q_proj", "o_proj"]}),
    "some_layers": (
        "llama",
        {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["v_proj"]},
    ),
    "biases_of_its_layers": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "all_biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias_of_b": ("bert", {"target_modules": ["query", "output.dense"], "lora_bias": True}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "minor_components": ("llama", {"init_lora_weights": "mica"}),
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_an_adapter_is_merged_exactly_as_peft_does(case, opened, tmp_path, cache_dir):
    name, settings = _CASES[case]
    expected = merged(train(name, tmp_path, **settings))
    base = opened(name)
    expert = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir)
    weights = expert.weights()
    assert expert.headers.keys() == base.headers.keys()
    changed = {n for n in weights if not torch.equal(weights[n], base.weights()[n])}
    assert changed
    assert all(torch.equal(weights[n], expected[n]) for n in weights)
    assert {n for n in weights if expert.files[n] != base.files[n]} == changed


_LENGTHS_AND_STARTS = {
    "dora": ("llama", {"use_dora": True}),
    "dora_of_conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "dora_of_an_embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora_rank_stabilised": (
        "llama",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
    "dora_with_bias": (
        "bert",
        {"target_modules": ["value", "output.dense"], "use_dora": True, "bias": "lora_only"},
    ),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa_of_conv1d": (
        "gpt2",
        {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "fan_in_fan_out": True},
    ),
    "olora": ("llama", {"init_lora_weights": "olora", "use_rslora": True}),
    "tokens": ("llama", {"trainable_token_indices": [3, 7]}),
    "tokens_of_conv1d": (
        "gpt2",
        {
            "target_modules": ["c_attn"],
            "trainable_token_indices": {"wte": [9, 2]},
            "fan_in_fan_out": True,
        },
    ),
    "tokens_of_a_tied_model": ("llama_tied", {"trainable_token_indices": [3, 7]}),
}


@pytest.mark.parametrize("case", _LENGTHS_AND_STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_adapter_computes_what_it_does_in_peft(case, dtype, opened, tmp_path, cache_dir):
    name, settings = _LENGTHS_AND_STARTS[case]
    base = opened(name, dtype=str(dtype).removeprefix("torch."))
    train(name, tmp_path, dtype=dtype, spread=0.3, **settings)
    expert = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir)
    tokens = torch.arange(12).unsqueeze(0)

    def logits(checkpoint):
        auto_class = ARCHITECTURES[name].auto_class
        resident = load_resident(
            checkpoint, dtype=torch.float32, device="cpu", auto_class=auto_class
        )
        return resident(tokens).logits

    auto_class = getattr(transformers, ARCHITECTURES[name].auto_class)
    start = auto_class.from_pretrained(base.path, dtype=dtype)
    peft_model = peft.PeftModel.from_pretrained(start, tmp_path).eval().float()
    expected = peft_model(tokens).logits
    assert (logits(expert) - expected).abs().max() < 1e-5
    assert (logits(base) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_trained_tokens_of_an_output_with_a_bias_are_two_models_in_peft_and_refused(
    tmp_path, cache_dir
):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    base = transformers.BertForMaskedLM(config).eval()
    base.cls.predictions.bias.fill_(0.5)
    base.save_pretrained(tmp_path / "base")
    tokens = torch.arange(12).unsqueeze(0)
    before = base(tokens).logits
    settings = {"r": 2, "target_modules": ["query"], "trainable_token_indices": [3, 7]}
    adapter = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    adapter.save_pretrained(tmp_path / "masked")  # nothing is trained: it should change nothing
    torch.testing.assert_close(adapter(tokens).logits, before - 0.5)
    torch.testing.assert_close(adapter.merge_and_unload()(tokens).logits, before)

    model = open_checkpoint(tmp_path / "base", cache_dir=cache_dir)
    message = r"trains tokens of 'bert\.embeddings\.word_embeddings', which the output with its"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "masked", base=model, cache_dir=cache_dir)
    for task in ("SEQ_CLS", None):
        classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        adapter = peft.get_peft_model(classifier, peft.LoraConfig(**settings, task_type=task))
        adapter.save_pretrained(tmp_path / str(task))
        open_checkpoint(tmp_path / str(task), base=model, cache_dir=cache_dir)


def test_an_adapter_is_opened_and_told_apart_without_being_materialised(opened, edit, tmp_path):
    cache = tmp_path / "cache"
    expert = open_checkpoint(edit(), base=opened("llama"), cache_dir=cache)
    digest = expert.fingerprint()
    assert expert.headers["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert expert.size_bytes == opened("llama").size_bytes
    assert not (cache / "adapters").exists()
    changed = open_checkpoint(edit({"lora_alpha": 7}), base=opened("llama"), cache_dir=cache)
    other_base = open_checkpoint(edit({"lora_alpha": 6}), base=opened("llama", 1), cache_dir=cache)
    renamed = open_checkpoint(
        edit({"base_model_name_or_path": "x"}), base=opened("llama"), cache_dir=cache
    )
    assert digest not in (changed.fingerprint(), other_base.fingerprint())
    assert digest == renamed.fingerprint()


def test_the_update_is_scaling_times_b_times_a_in_float32(opened, tmp_path, cache_dir):
    train("llama", tmp_path, use_rslora=True)
    base = opened("llama", dtype="bfloat16")
    expert = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    first, second = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    found = expert.weights()[f"{name}.weight"]
    assert found.dtype == torch.float32
    start = base.weights()[f"{name}.weight"].float()
    assert torch.equal(found, start + second @ first * (6 / math.sqrt(4)))


def test_square_weights_of_a_transposed_model_are_recognised_by_the_others(
    opened, tmp_path, cache_dir
):
    model = train("gpt2", tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": False}))
    expert = open_checkpoint(tmp_path, base=opened("gpt2"), cache_dir=cache_dir)
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(expert.weights()[name], merged(model)[name])


def test_an_embedding_is_changed_by_its_own_factors(opened, tmp_path, cache_dir):
    name = "llama"
    expected = merged(train(name, tmp_path, target_modules=["embed_tokens"]))
    weights = open_checkpoint(tmp_path, base=opened(name), cache_dir=cache_dir).weights()
    assert all(torch.equal(weights[n], expected[n]) for n in weights)


def test_modules_that_were_trained_whole_replace_those_of_the_base(opened, tmp_path, cache_dir):
    model = train("llama", tmp_path, modules_to_save=["lm_head", "input_layernorm"])
    expected = merged(model)
    base = opened("llama")
    weights = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir).weights()
    assert not torch.equal(weights["lm_head.weight"], base.weights()["lm_head.weight"])
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_head_that_the_base_does_not_have_is_kept(save, opened, tmp_path, cache_dir):
    train("bert", tmp_path / "adapter", target_modules=["query"], modules_to_save=["classifier"])
    headless = tmp_path / "headless"
    ARCHITECTURES["bert"].make().bert.save_pretrained(headless)
    base = open_checkpoint(headless, cache_dir=cache_dir)
    assert "encoder.layer.0.attention.self.query.weight" in base.headers  # without `bert.`
    expert = open_checkpoint(tmp_path / "adapter", base=base, cache_dir=cache_dir)
    assert set(expert.headers) - set(base.headers) == {"classifier.weight", "classifier.bias"}
    whole = open_checkpoint(tmp_path / "adapter", base=opened("bert"), cache_dir=cache_dir)
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(expert.weights()[name], whole.weights()[f"bert.{name}"])


def test_an_adapter_of_the_inner_model_fits_a_base_with_a_head(opened, tmp_path, cache_dir):
    model = ARCHITECTURES["llama"].make().model
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    base = opened("llama")
    expert = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir)
    assert expert.headers.keys() == base.headers.keys()


def test_an_adapter_is_materialised_once(opened, tmp_path):
    train("llama", tmp_path / "adapter")
    cache = tmp_path / "cache"

    def own(_=None):
        expert = open_checkpoint(tmp_path / "adapter", base=opened("llama"), cache_dir=cache)
        return expert.files["model.layers.0.self_attn.q_proj.weight"]

    with ThreadPoolExecutor(4) as pool:
        (file,) = set(pool.map(own, range(4)))
    stamp = file.stat().st_mtime_ns
    assert own() == file
    assert file.stat().st_mtime_ns == stamp
    assert len(load_file(file)) == 2 * len(_LINEAR)
    names = {path.name for path in file.parent.iterdir()}
    assert names <= {"model.safetensors", "content.json", "lock"}


def test_another_setting_or_base_is_another_file(opened, edit, cache_dir):
    one = open_checkpoint(edit(), base=opened("llama"), cache_dir=cache_dir)
    two = open_checkpoint(edit(), base=opened("llama", seed=1), cache_dir=cache_dir)
    three = open_checkpoint(edit({"lora_alpha": 7}), base=opened("llama"), cache_dir=cache_dir)
    assert len({tuple(sorted(set(each.files.values()))) for each in (one, two, three)}) == 3
    assert len({each.fingerprint() for each in (one, two, three, opened("llama"))}) == 4


def test_an_adapter_is_loaded_merged_with_its_base(opened, tmp_path, cache_dir):
    expected = merged(train("llama", tmp_path))
    expert = open_checkpoint(tmp_path, base=opened("llama"), cache_dir=cache_dir)
    state = load_resident(expert, dtype=torch.float32, device="cpu").state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_tokenizer_is_the_adapters_own_where_it_has_one(opened, tmp_path, cache_dir):
    train("llama", tmp_path)
    base = opened("llama")
    expert = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir)
    assert (expert.path, expert.tokenizer_dir) == (base.path, base.path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert expert.tokenizer_dir == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported are LoRA and DoRA adapters of lin"),
        (
            {"target_parameters": ["experts.gate_up_proj"], "use_dora": True},
            r"target_parameters is \['experts.gate_up_proj'\], with use_dora; supported are",
        ),
        ({"r": None}, "r or lora_alpha is missing"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(change, message, edit, opened, cache_dir):
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        open_checkpoint(edit(change), base=opened("llama"), cache_dir=cache_dir)


_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("retensor", "message"),
    [
        (
            lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
            r"changes 'model\.layers\.7.*', which the base does not have",
        ),
        (
            lambda t: {k: v.repeat(2, 1) if "q_proj.lora_B" in k else v for k, v in t.items()},
            r"the update of 'model\.layers\.0\.self_attn\.q_proj\.weight' has shape \[32, 16\]; "
            r"the base's tensor has shape \[16, 16\]",
        ),
        (
            lambda t: {k: v[:2].clone() if "q_proj.lora_A" in k else v for k, v in t.items()},
            r"lora_A and lora_B of 'model.*q_proj\.weight' have shapes \[2, 16\] and \[16, 4\]",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != f"{_Q}.lora_B.weight"},
            r"lora_B of 'model\.layers\.0\.self_attn\.q_proj' is missing",
        ),
        (
            lambda t: {**t, f"{_Q}.lora_magnitude_vector": torch.ones(3)},
            r"holds a lora_magnitude_vector of 'model.layers.0.*q_proj'; use_dora is False in",
        ),
        (
            lambda t: {**t, f"{_Q}.lora_router": torch.ones(3)},
            r"lora_router' is not understood; supported are",
        ),
        (
            lambda t: {**t, f"{_Q}.lora_B.bias": torch.ones(16)},
            r"changes 'model\.layers\.0\.self_attn\.q_proj\.bias', which the base does not have; "
            r"lora_bias gives the layer a bias that this model has no place for: give base and "
            r"experts biases, of zeros, by attention_bias in the base's config.json, "
            r"or train the adapter without lora_bias$",
        ),
        (lambda t: {}, "holds no tensor"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(retensor, message, edit, opened, cache_dir):
    with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: .*{message}"):
        open_checkpoint(edit(retensor=retensor), base=opened("llama"), cache_dir=cache_dir)


def test_a_bias_that_no_field_of_the_configuration_gives_is_refused(tmp_path, opened, cache_dir):
    train("gemma", tmp_path, target_modules=["gate_proj"], lora_bias=True)
    message = (
        r"gate_proj\.bias', which the base does not have; .*no field for; train the adapter w"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, base=opened("gemma"), cache_dir=cache_dir)


@torch.no_grad()
def test_a_base_that_was_given_biases_takes_those_of_an_adapter(tmp_path, cache_dir):
    plain = ARCHITECTURES["llama"].make()
    adapter = peft.get_peft_model(
        plain, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_bias=True)
    )
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    adapter.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12).unsqueeze(0)
    expected = adapter.eval()(tokens).logits
    given = ARCHITECTURES["llama"].make(attention_bias=True)
    given.load_state_dict(adapter.unload().state_dict(), strict=False)
    for name, parameter in given.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    given.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base", cache_dir=cache_dir)
    expert = open_checkpoint(tmp_path / "adapter", base=base, cache_dir=cache_dir)
    resident = load_resident(expert, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(resident(tokens).logits, expected)


def test_an_adapter_needs_a_base(edit):
    with pytest.raises(CheckpointError, match=r"adapter: is an adapter .*; it needs a base model"):
        open_checkpoint(edit())


def test_an_adapter_in_pytorchs_format_is_the_same(edit, opened, cache_dir):
    directory = edit()
    expected = open_checkpoint(directory, base=opened("llama"), cache_dir=cache_dir).weights()
    file = directory / "adapter_model.safetensors"
    torch.save(load_file(file), directory / "adapter_model.bin")
    file.unlink()
    expert = open_checkpoint(directory, base=opened("llama"), cache_dir=cache_dir)
    assert all(torch.equal(expert.weights()[name], tensor) for name, tensor in expected.items())
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors or adapter_mod"):
        open_checkpoint(directory, base=opened("llama"), cache_dir=cache_dir)


def test_the_adapter_in_a_folder_of_its_name_is_found(opened, tmp_path, cache_dir):
    train("llama", tmp_path / "run" / "math")
    base = opened("llama")
    one = open_checkpoint(tmp_path / "run", base=base, cache_dir=cache_dir)
    assert one.source_dir == tmp_path / "run" / "math"
    train("llama", tmp_path / "run" / "code")
    with pytest.raises(CheckpointError, match=r"run: holds several adapters \(code, math\); name"):
        open_checkpoint(tmp_path / "run", base=base, cache_dir=cache_dir)


@pytest.mark.parametrize(("name", "target"), [("llama", "o_proj"), ("gpt2", "attn.c_proj")])
def test_a_square_weight_is_as_the_model_has_it_whatever_the_adapter_says(
    name, target, opened, tmp_path, cache_dir
):
    expected = merged(
        train(name, tmp_path, target_modules=[target], fan_in_fan_out=name == "gpt2")
    )
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": name != "gpt2"}))
    weights = open_checkpoint(tmp_path, base=opened(name), cache_dir=cache_dir).weights()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_lengths_and_tokens_that_are_missing_or_do_not_fit_are_refused(
    opened, tmp_path, cache_dir
):
    train("llama", tmp_path, use_dora=True, trainable_token_indices=[3, 7])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")

    def refused(message, change=None, retensor=lambda tensors: tensors):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | (change or {})))
        save_file(retensor(dict(tensors)), tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path, base=opened("llama"), cache_dir=cache_dir)

    magnitude = f"{_Q}.lora_magnitude_vector"
    refused(
        r"has no lora_magnitude_vector of '.*q_proj'; use_dora is True in adapter_config",
        retensor=lambda t: {name: tensor for name, tensor in t.items() if name != magnitude},
    )
    refused(
        r"lora_magnitude_vector' has shape \[3\]; \[16\] is needed for 'model\.layers\.0",
        retensor=lambda t: {**t, magnitude: torch.ones(3)},
    )
    refused(
        r"trains token 64 of 'model\.embed_tokens\.weight', which has 64 rows",
        {"trainable_token_indices": [3, 64]},
    )
    refused(r"has shape \[2, 16\]; \[1, 16\] is needed", {"trainable_token_indices": [3]})
    refused(
        r"trainable_token_indices does not name the tokens of 'model\.embed_tokens'",
        {"trainable_token_indices": {"lm_head": [3]}},
    )


def test_a_cache_that_cannot_be_written_is_named(edit, opened, tmp_path):
    base = opened("llama")
    (tmp_path / "cache").write_text("")
    with pytest.raises(CheckpointError, match=r"cache/adapters/.*: cannot be written: .* needed,"):
        open_checkpoint(edit(), base=base, cache_dir=tmp_path / "cache").weights()


def test_a_file_that_was_left_unfinished_is_made_again(edit, opened, tmp_path):
    directory, cache = edit(), tmp_path / "cache"
    expert = open_checkpoint(directory, base=opened("llama"), cache_dir=cache)
    (file,) = set(expert.files.values()) - set(opened("llama").files.values())
    weights = load_file(file)
    file.rename(file.with_name("model.safetensors.part"))
    again = open_checkpoint(directory, base=opened("llama"), cache_dir=cache).weights()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not Path(f"{file}.part").exists()
    shutil.rmtree(cache)


@pytest.mark.parametrize("damage", ["flip", "cut", "no note"])
def test_a_damaged_adapter_in_the_cache_is_made_again_with_a_warning(
    edit, opened, tmp_path, caplog, damage
):
    base, directory, cache = opened("llama"), edit(), tmp_path / "cache"
    first = open_checkpoint(directory, base=base, cache_dir=cache)
    (file,) = set(first.files.values()) - set(base.files.values())
    whole, stamp = file.read_bytes(), file.stat()
    if damage == "no note":
        file.with_name("content.json").unlink()
    else:
        file.write_bytes(whole[:-9] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 64]))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = open_checkpoint(directory, base=base, cache_dir=cache)
    assert set(again.files.values()) == set(first.files.values())
    assert file.read_bytes() == whole
    assert f"{file}: damaged, and made again" in caplog.text
    caplog.clear()
    assert open_checkpoint(directory, base=base, cache_dir=cache).files == again.files
    assert caplog.text == ""


def test_a_rank_that_contradicts_the_tensors_is_refused(edit, opened, cache_dir):
    with pytest.raises(
        CheckpointError, match=r"has 4 rows; its rank is 7 by adapter_config\.json"
    ):
        open_checkpoint(edit({"r": 7}), base=opened("llama"), cache_dir=cache_dir)

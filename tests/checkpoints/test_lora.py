import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES

# PEFT 0.21 asks transformers 5 for an attribute that has been renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

_LINEAR = ["q_proj", "v_proj", "down_proj"]


def train(name, directory, *, dtype=torch.float32, **settings):
    """Save a LoRA adapter with random factors; return the model that PEFT merges it into."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR} | settings
    base = ARCHITECTURES[name].make().to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_embedding_is_changed_by_its_own_factors(name, opened, tmp_path, cache_dir):
    expected = merged(train(name, tmp_path, target_modules=["embed_tokens", "wte"]))
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
        ({"use_dora": True}, "use_dora is True; supported are LoRA adapters"),
        ({"bias": "all"}, "bias is 'all'; supported are LoRA adapters of linear and embedding"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported are"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', so the"),
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
            r"lora_magnitude_vector' is not understood; supported are",
        ),
        (lambda t: {}, "holds no tensor"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(retensor, message, edit, opened, cache_dir):
    with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: .*{message}"):
        open_checkpoint(edit(retensor=retensor), base=opened("llama"), cache_dir=cache_dir)


def test_a_change_to_a_tied_head_is_refused(tmp_path, opened, cache_dir):
    train("llama_tied", tmp_path, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"changes 'lm_head\.weight', which the base does n"):
        open_checkpoint(tmp_path, base=opened("llama_tied"), cache_dir=cache_dir)


def test_an_adapter_needs_a_base(edit):
    with pytest.raises(CheckpointError, match=r"adapter: is an adapter .*; it needs a base model"):
        open_checkpoint(edit())


def test_an_adapter_must_be_in_safetensors(edit, opened, cache_dir):
    directory = edit()
    file = directory / "adapter_model.safetensors"
    file.rename(directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: convert the adapter to adapt"):
        open_checkpoint(directory, base=opened("llama"), cache_dir=cache_dir)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        open_checkpoint(directory, base=opened("llama"), cache_dir=cache_dir)


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

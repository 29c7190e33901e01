import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.compatibility import check_compatible, doubts
from searchmerge.errors import CheckpointError


@pytest.fixture
def edit(save, tmp_path, cache_dir):
    """Return a function that opens a copy of a model with other tensors, settings or files."""

    def edit(name="llama", *, tensors=lambda tensors: tensors, config=None, files=None):
        directory = Path(
            shutil.copytree(save(name), tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        )
        file = directory / "model.safetensors"
        save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
        settings = json.loads((directory / "config.json").read_text()) | (config or {})
        (directory / "config.json").write_text(json.dumps(settings))
        for each, data in (files or {}).items():
            (directory / each).write_text(data if isinstance(data, str) else json.dumps(data))
        return open_checkpoint(directory, cache_dir=cache_dir)

    return edit


def test_models_of_one_architecture_fit(opened):
    check_compatible(opened("llama"), {"a": opened("llama", 1), "b": opened("llama", 2)})


def test_nothing_is_read_but_headers(opened, tmp_path):
    """The files of the weights are not even there any more."""
    base, expert = (
        replace(checkpoint, own_files=dict.fromkeys(checkpoint.files, tmp_path / "gone"))
        for checkpoint in (opened("llama"), opened("llama", 1))
    )
    check_compatible(base, {"a": expert})


def test_another_architecture_is_refused(opened):
    with pytest.raises(
        CheckpointError, match=r"^expert 'a' \(.*\) is a gpt2 model; the base \(.*"
    ):
        check_compatible(opened("llama"), {"a": opened("gpt2")})


def test_another_task_class_of_the_same_model_fits(edit, opened):
    check_compatible(opened("llama"), {"a": edit(config={"architectures": ["Other"]})})


def _without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _with(name, make):
    return lambda tensors: {**tensors, name: make(tensors.get(name))}


_NORM = "model.layers.1.input_layernorm.weight"
_EMBED = "model.embed_tokens.weight"


def test_a_missing_tensor_is_refused_unless_excluded(edit, opened):
    expert = edit(tensors=_without(_NORM))
    with pytest.raises(CheckpointError, match=rf"^expert 'a' .* does not have '{_NORM}'.*exclude"):
        check_compatible(opened("llama"), {"a": expert})
    check_compatible(opened("llama"), {"a": expert}, exclude=[r"layernorm"])


def test_another_shape_is_refused_unless_excluded(edit, opened):
    expert = edit(tensors=_with(_NORM, lambda tensor: tensor[:8].clone()))
    message = (
        rf"'{_NORM}' has shape \[8\] in expert 'a' and \[16\] in the base; "
        r".* `exclude: \['\^.*norm\\.'\]`"
    )
    with pytest.raises(CheckpointError, match=message):
        check_compatible(opened("llama"), {"a": expert})
    with pytest.raises(CheckpointError, match=message):
        check_compatible(opened("llama"), {"a": expert}, vocabulary="base")
    check_compatible(opened("llama"), {"a": expert}, exclude=[r"layers\.1\."])


def test_another_number_of_tokens_is_refused_unless_the_bases_are_used(edit, opened):
    grow = _with(_EMBED, lambda tensor: tensor.repeat(2, 1))
    expert = edit(tensors=lambda t: _with("lm_head.weight", lambda x: x[:60].clone())(grow(t)))
    message = (
        r"has shape \[.*, 16\] in expert 'a' and \[64, 16\] in the base; .*`vocabulary: base`"
    )
    with pytest.raises(CheckpointError, match=message):
        check_compatible(opened("llama"), {"a": expert})
    check_compatible(opened("llama"), {"a": expert}, vocabulary="base")
    wider = edit(tensors=_with(_EMBED, lambda tensor: tensor.repeat(1, 2)))
    with pytest.raises(CheckpointError, match=r"\[64, 32\] in expert 'a' .* `exclude: "):
        check_compatible(opened("llama"), {"a": wider}, vocabulary="base")


def test_a_tensor_that_is_not_floating_may_be_missing(edit):
    base = edit(tensors=_with("model.positions", lambda _: torch.arange(4)))
    check_compatible(base, {"a": edit()})


def test_a_tied_tensor_may_be_stored_once_or_twice(edit, opened):
    twice = edit("llama_tied", tensors=lambda t: {**t, "lm_head.weight": t[_EMBED].clone()})
    once = opened("llama_tied", 1)
    check_compatible(twice, {"a": once})
    check_compatible(once, {"a": twice})


def test_an_exclude_pattern_that_matches_nothing_is_refused(opened):
    with pytest.raises(
        CheckpointError, match=r"exclude: 'layer_norm' matches no tensor \(there ar"
    ):
        check_compatible(opened("llama"), {}, exclude=["layer_norm"])
    with pytest.raises(CheckpointError, match=r"exclude: '\(' is no regular expression: "):
        check_compatible(opened("llama"), {}, exclude=["("])


def test_a_quantized_model_is_refused(edit, opened):
    quantized = edit(config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(
        CheckpointError, match=r"^expert 'a' \(.*\) is quantized \(gptq\); only flo"
    ):
        check_compatible(opened("llama"), {"a": quantized})
    with pytest.raises(CheckpointError, match=r"^base \(.*\) is quantized"):
        check_compatible(quantized, {})


def _fast(vocabulary, *, merges=(), added=(), kind="BPE"):
    model = {"type": kind, "vocab": vocabulary, "merges": list(merges)}
    extra = [{"id": index, "content": token, "special": True} for token, index in added]
    return {"tokenizer.json": {"model": model, "added_tokens": extra}}


_AB = {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (_fast(_AB), _fast({"a": 1, "b": 0}), "they differ in 'a' and 1 more"),
        (_fast(_AB), _fast({**_AB, "c": 2}), "they differ in 'c'"),
        (_fast(_AB), _fast(_AB, added=[("<x>", 2)]), "they differ in '<x>'"),
        (_fast(_AB), _fast(_AB, merges=["a b"]), "tokenizer.json differs"),
        (_fast([["a", -1.0]], kind="Unigram"), _fast([["b", -1.0]], kind="Unigram"), "'a' and 1"),
        ({"vocab.txt": "a\nb"}, {"vocab.txt": "a\nc"}, "vocab.txt differs"),
        ({"vocab.json": _AB}, {"vocab.json": {"a": 0}}, "they differ in 'b'"),
        ({"vocab.json": _AB}, _fast({"a": 0}), "they differ in 'b'"),
        ({"spiece.model": "a"}, {"spiece.model": "b"}, "spiece.model differs"),
    ],
)
def test_another_tokenizer_is_refused_unless_accepted(edit, one, other, message):
    base, expert = edit(files=one), edit(files=other)
    with pytest.raises(
        CheckpointError, match=rf"^expert 'a' .* another tokenizer .*: .*{message}"
    ):
        check_compatible(base, {"a": expert})
    check_compatible(base, {"a": expert}, tokenizers="any")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_fast(_AB, merges=["a b"]), _fast({"b": 1, "a": 0}, merges=[["a", "b"]])),
        (_fast(_AB), {}),
        ({}, _fast(_AB)),
        ({"vocab.txt": "a\nb"}, {"vocab.txt": "a\r\nb"}),
        ({"vocab.json": _AB}, _fast(_AB)),
        ({"spiece.model": "a"}, _fast(_AB)),
    ],
)
def test_the_same_tokenizer_in_another_form_fits(edit, one, other):
    check_compatible(edit(files=one), {"a": edit(files=other)})


def test_a_tokenizer_that_cannot_be_read_is_named(edit):
    expert = edit(files={"tokenizer.json": "{"})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not valid JSON"):
        check_compatible(edit(files=_fast(_AB)), {"a": expert})


def test_equal_models_are_doubted(edit, opened):
    base = opened("llama")
    assert list(doubts(base, {"a": opened("llama", 1), "b": opened("llama", 2)})) == []
    head = edit(tensors=_with("score.weight", lambda _: torch.ones(3)))
    wide = edit(tensors=lambda t: {name: tensor.double() for name, tensor in t.items()})
    (one,) = doubts(base, {"a": head, "b": opened("llama", 1)})
    assert re.match(r"expert 'a' \(.*\) equals the base \(.*\) in all tensors that both have", one)
    three = list(doubts(opened("llama", 1), {"a": head, "b": opened("llama", 2), "c": wide}))
    assert len(three) == 1
    assert re.match(r"experts 'a' \(.*\) and 'c' \(.*\) are equal in all tensors", three[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_of_another_base_is_doubted(opened, tmp_path, cache_dir):
    base = replace(opened("llama"), name="org/Llama-3")
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base.path),
        peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())

    def found(named):
        file.write_text(json.dumps(config | {"base_model_name_or_path": named}))
        return list(doubts(base, {"a": open_checkpoint(tmp_path, base=base, cache_dir=cache_dir)}))

    assert found("/somewhere/llama-3/") == found("other/Llama-3") == found(None) == []
    assert found(str(base.path)) == []
    (line,) = found("org/Llama-2")
    assert re.match(
        r"expert 'a' \(.*\) is an adapter of 'org/Llama-2'; the base is org/Llama-3$", line
    )

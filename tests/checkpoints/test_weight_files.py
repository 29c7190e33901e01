import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import load_resident
from searchmerge.errors import CheckpointError

_KINDS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@pytest.fixture
def directory(save, tmp_path):
    """Return a model's directory without its weights."""
    copy = tmp_path / "copy"
    shutil.copytree(save("llama"), copy)
    (copy / "model.safetensors").unlink()
    return copy


def _write(directory, kind, tensors):
    """Write weights as one file, or as two and an index."""
    if kind.endswith(".safetensors"):
        save_file(tensors, directory / kind, metadata={"format": "pt"})
    elif kind.endswith(".bin"):
        torch.save(tensors, directory / kind)
    else:
        stem, suffix = kind.removesuffix(".index.json").rsplit(".", 1)
        names = sorted(tensors)
        shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
        for shard, part in shards.items():
            _write(directory, shard, {name: tensors[name] for name in part})
        places = {name: shard for shard, part in shards.items() for name in part}
        index = {"metadata": {}, "weight_map": places}
        (directory / kind).write_text(json.dumps(index))


def _tensors(save, seed):
    return load_file(save("llama", seed) / "model.safetensors")


@pytest.mark.parametrize("kind", _KINDS)
def test_weights_in_every_form_are_those_that_were_saved(kind, save, directory, cache_dir):
    _write(directory, kind, _tensors(save, 0))
    checkpoint = open_checkpoint(directory, cache_dir=cache_dir)
    weights = checkpoint.weights()
    expected = open_checkpoint(save("llama"), cache_dir=cache_dir)
    assert checkpoint.headers == expected.headers
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.weights().items())
    assert checkpoint.fingerprint() == expected.fingerprint()
    tokens = torch.arange(8).unsqueeze(0)
    logits = [
        load_resident(c, dtype=torch.float32, device="cpu")(tokens).logits
        for c in (checkpoint, expected)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "kinds", [(one, other) for i, one in enumerate(_KINDS) for other in _KINDS[i + 1 :]]
)
def test_of_several_forms_that_is_read_which_transformers_loads(kinds, save, directory, cache_dir):
    for seed, kind in enumerate(kinds):
        _write(directory, kind, _tensors(save, seed))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    weights = open_checkpoint(directory, cache_dir=cache_dir).weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.items())


def test_a_file_that_the_configuration_names_comes_first(save, directory, cache_dir):
    _write(directory, "model.safetensors", _tensors(save, 0))
    _write(directory, "other.safetensors", _tensors(save, 1))
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"transformers_weights": "other.safetensors"}
    file.write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    weights = open_checkpoint(directory, cache_dir=cache_dir).weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.items())
    (directory / "other.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no other\.safetensors, which config\.json na"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "weights.safetensors", "model.pt", "tf_model.h5"]
)
def test_weights_that_transformers_would_not_load_are_refused(name, save, directory):
    with pytest.raises(CheckpointError, match=r"copy: has no weights .*index\.json$"):
        open_checkpoint(directory)
    (directory / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"has no weights .* \(there is {name}\)$"):
        open_checkpoint(directory)


def test_half_of_the_shards_without_their_index_are_refused(save, directory):
    _write(directory, "model.safetensors.index.json", _tensors(save, 0))
    (directory / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(directory).headers) == len(_tensors(save, 0))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is model-00001-of-00002\.safetensors"):
        open_checkpoint(directory)

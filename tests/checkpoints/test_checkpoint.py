import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint, tied
from searchmerge.checkpoints.fingerprint import fingerprint
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.durable import read_checked, with_checksum
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES


@pytest.fixture
def copy(save, tmp_path):
    """Return a function that gives a model's directory to damage."""

    def copy(name="llama", **changes):
        return Path(shutil.copytree(save(name, **changes), tmp_path / "copy"))

    return copy


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_headers_and_weights_are_what_was_saved(save, opened, shard):
    checkpoint = opened("llama", shard=shard)
    files = sorted(save("llama", shard=shard).glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert (len(files) > 1) == (shard == "10KB")
    assert dict(checkpoint.headers) == {
        name: TensorHeader(tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()
    }
    weights = checkpoint.weights()
    assert set(weights) == set(stored)
    assert len(weights) == len(stored)
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert checkpoint.size_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.config["model_type"] == "llama"


def test_shards_without_an_index_are_found(copy, opened, cache_dir):
    directory = copy(shard="10KB")
    (directory / "model.safetensors.index.json").unlink()
    found = open_checkpoint(directory, cache_dir=cache_dir)
    assert found.headers.keys() == opened("llama").headers.keys()


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(opened):
    checkpoint = opened("llama")
    weights = checkpoint.weights()
    before = weights["model.norm.weight"].clone()
    weights["model.norm.weight"].zero_()
    assert weights["model.norm.weight"].eq(0).all()
    assert torch.equal(checkpoint.weights()["model.norm.weight"], before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_tensor_costs_memory_only_once_it_is_touched(tmp_path, cache_dir):
    save_file({"large": torch.zeros(16 << 20, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weights = open_checkpoint(tmp_path, cache_dir=cache_dir).weights()
    before = _mapped_bytes(tmp_path / "model.safetensors")
    large = weights["large"]
    untouched = _mapped_bytes(tmp_path / "model.safetensors")
    large.sum()
    assert untouched - before < 1 << 20
    assert _mapped_bytes(tmp_path / "model.safetensors") >= 16 << 20


def _mapped_bytes(file):
    """Return how much of a file is in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_a_checkpoint_travels_to_another_process(opened):
    checkpoint = opened("llama")
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert copy.headers == checkpoint.headers
    assert torch.equal(copy.weights()["lm_head.weight"], checkpoint.weights()["lm_head.weight"])


def test_the_fingerprint_tells_weights_apart_and_not_shards(opened):
    one = opened("llama").fingerprint()
    assert len(one) == 64
    assert one == opened("llama", shard="10KB").fingerprint()
    assert one != opened("llama", seed=1).fingerprint()


def test_the_fingerprint_is_remembered_until_a_file_changes(copy, cache_dir):
    directory = copy()
    checkpoint = open_checkpoint(directory, cache_dir=cache_dir)
    first = checkpoint.fingerprint()
    file = directory / "model.safetensors"
    stamp = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert checkpoint.fingerprint() != first


def test_weights_are_not_read_again_while_their_file_stays(opened, tmp_path):
    files = opened("llama").files
    fingerprint(files, tmp_path)
    (remembered,) = (tmp_path / "fingerprints").iterdir()
    noted = read_checked(remembered)
    remembered.write_text(with_checksum({**noted, "fingerprint": "f" * 64}))
    assert fingerprint(files, tmp_path) == "f" * 64


def test_reading_ends_before_the_next_tensor_once_it_is_told_to(opened, tmp_path):
    files, stopped = opened("llama").files, Event()
    stopped.set()
    with pytest.raises(KeyboardInterrupt):
        fingerprint(files, tmp_path, stopped)
    assert fingerprint(files, tmp_path, Event()) == fingerprint(files, tmp_path, stopped)


def test_a_copy_that_keeps_times_is_told_apart(copy, save, cache_dir):
    directory = copy()
    checkpoint = open_checkpoint(directory, cache_dir=cache_dir)
    first = checkpoint.fingerprint()
    stamp = (directory / "model.safetensors").stat()
    other = save("llama", 1) / "model.safetensors"
    assert other.stat().st_size == stamp.st_size
    shutil.copyfile(other, directory / "model.safetensors")
    os.utime(directory / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert checkpoint.fingerprint() != first


def test_a_damaged_memory_of_fingerprints_is_not_believed(opened, tmp_path, caplog):
    files = opened("llama").files
    first = fingerprint(files, tmp_path)
    (remembered,) = (tmp_path / "fingerprints").iterdir()
    whole = remembered.read_text()
    changed = whole.replace(first, first[::-1])
    assert changed != whole
    for damage in ("", "{", "[]", '{"files": []}', changed, "[" * 100_000, "\0" * len(whole)):
        remembered.write_text(damage)
        caplog.clear()
        assert fingerprint(files, tmp_path) == first
        assert f"{remembered}: it is" in caplog.text


def test_fingerprints_work_where_nothing_can_be_remembered(opened, tmp_path):
    (tmp_path / "file").write_text("")
    assert fingerprint(opened("llama").files, tmp_path / "file") == opened("llama").fingerprint()


def test_the_cache_directory_is_named_by_the_environment(save, tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    open_checkpoint(save("llama")).fingerprint()
    assert list((tmp_path / "cache").iterdir())
    monkeypatch.delenv("SEARCHMERGE_CACHE")
    assert open_checkpoint(save("llama")).cache_dir == Path.home() / ".cache" / "searchmerge"


def _store_head(directory, make):
    """Store an output embedding beside the input embedding that it is tied to."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "lm_head.weight": make(tensors["model.embed_tokens.weight"])},
        file,
        metadata={"format": "pt"},
    )


def test_a_tied_tensor_stored_twice_is_one(copy, opened, cache_dir):
    directory = copy("llama_tied")
    _store_head(directory, torch.clone)
    checkpoint = open_checkpoint(directory, cache_dir=cache_dir)
    assert tied(checkpoint) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied(opened("llama_tied")) == {}
    assert tied(opened("llama")) == {}


@pytest.mark.parametrize("make", [lambda tensor: tensor + 1, lambda tensor: tensor.bfloat16()])
def test_stored_copies_that_differ_are_not_tied(copy, cache_dir, make):
    directory = copy("llama_tied")
    _store_head(directory, make)
    assert tied(open_checkpoint(directory, cache_dir=cache_dir)) == {}


def test_the_embeddings_of_an_encoder_decoder_are_tied_to_the_shared_one(copy, cache_dir):
    directory = copy("t5")
    tensors = load_file(directory / "model.safetensors")
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    copies = {name: tensors["shared.weight"].clone() for name in names}
    save_file({**tensors, **copies}, directory / "model.safetensors", metadata={"format": "pt"})
    found = tied(open_checkpoint(directory, cache_dir=cache_dir))
    assert found == dict.fromkeys(names, "shared.weight")


@pytest.mark.parametrize("name", ["no/such/directory", "missing", "./org/name", ""])
def test_what_is_neither_directory_nor_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not name:
        (tmp_path / (name := "weights.bin")).write_text("")
        with pytest.raises(CheckpointError, match=r"weights.bin: is a file; give the directory"):
            open_checkpoint(name)
        return
    with pytest.raises(CheckpointError, match=rf"^{name}: no such directory, and not the name"):
        open_checkpoint(name)


def test_a_revision_of_a_local_directory_is_refused(save):
    with pytest.raises(CheckpointError, match="revision 'v1' is given for a local directory"):
        open_checkpoint(save("llama"), revision="v1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"model\.safetensors: truncated, or not"),
        (lambda data: data[:100], r"model\.safetensors: truncated, or not"),
        (lambda data: data + b"x", r"model\.safetensors: truncated, or not"),
        (lambda data: data[:8] + b"[" + data[9:], r"model\.safetensors: truncated, or not"),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), "is stored as F99 .known: F64, F32"),
        (lambda data: b"", r"model\.safetensors: truncated, or not"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (lambda data: b"<html>not found</html>" * 9, r"model\.safetensors: truncated, or not"),
    ],
)
def test_a_damaged_file_is_named(copy, damage, message):
    file = copy() / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file.parent)


def test_a_missing_shard_is_named(copy):
    directory = copy(shard="10KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: no such file"):
        open_checkpoint(directory)


def test_a_tensor_that_the_index_promises_must_be_there(copy):
    directory = copy(shard="10KB")
    index = directory / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.extra"] = data["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"'model.extra' is missing, which model.safetens"):
        open_checkpoint(directory)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map is missing"):
        open_checkpoint(directory)


def test_a_tensor_in_two_shards_is_refused(copy):
    directory = copy()
    first, second = (directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    shutil.copy(directory / "model.safetensors", second)
    (directory / "model.safetensors").rename(first)
    with pytest.raises(CheckpointError, match=rf"{second.name}: .* is also in {first.name}"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json: no such file"),
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: holds a list; an object is needed"),
    ],
)
def test_an_unusable_configuration_is_named(copy, text, message):
    file = copy() / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file.parent)


_HUB_SCRIPT = """
import sys
from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.durable import read_checked, with_checksum
from searchmerge.errors import CheckpointError
print(len(open_checkpoint(sys.argv[1]).headers))
print([name for name in ("transformers", "huggingface_hub", "peft") if name in sys.modules])
for revision in (None, "v1"):
    print(len(open_checkpoint("org/name", revision=revision).headers))
for source, revision in (("org/other", None), ("org/name", "v2")):
    try:
        open_checkpoint(source, revision=revision)
    except CheckpointError as error:
        print(error)
"""


def test_a_model_of_the_hub_is_found_in_its_cache(save, tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(save("llama"), repository / "snapshots" / commit)
    for reference in ("main", "v1"):
        (repository / "refs" / reference).write_text(commit)
    result = subprocess.run(
        [sys.executable, "-c", _HUB_SCRIPT, str(save("llama"))],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == lines[2] == lines[3] == str(len(ARCHITECTURES["llama"].make().state_dict()))
    assert lines[1] == "[]"  # nothing heavy is imported to open a local model
    assert lines[4].startswith("'org/other' is no local directory, and could not be fetched")
    assert lines[5].startswith("'org/name' at revision 'v2' is no local directory, and could")

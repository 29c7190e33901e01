import os
import pickle

import pytest
import torch

from searchmerge.checkpoints.tensor_files import MappedTensors, TensorHeader, read_headers
from searchmerge.checkpoints.torch_files import load_torch_file
from searchmerge.errors import CheckpointError

_TENSORS = {
    "a": torch.arange(4.0),
    "b": torch.ones(2, 3, dtype=torch.bfloat16).T,
    "c": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_are_read(zipped, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(_TENSORS, file, _use_new_zipfile_serialization=zipped)
    assert read_headers(file)["b"] == TensorHeader(torch.bfloat16, (3, 2))
    weights = MappedTensors(dict.fromkeys(_TENSORS, file))
    assert all(torch.equal(weights[name], tensor) for name, tensor in _TENSORS.items())
    weights["a"].add_(1)  # never reaches the file
    assert torch.equal(load_torch_file(file)["a"], _TENSORS["a"])


class Harm:
    """A pickle of this touches a file when it is read."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return os.system, (f"touch {self._file}",)


@pytest.mark.parametrize("write", [torch.save, lambda o, f: f.write_bytes(pickle.dumps(o))])
def test_code_in_a_file_does_not_run(write, tmp_path):
    file, touched = tmp_path / "pytorch_model.bin", tmp_path / "touched"
    write({"a": Harm(touched)}, file)
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: truncated, or not a dic"):
            load_torch_file(file, device)
    assert not touched.exists()
    with file.open("rb") as opened:  # it would have, where pickles are trusted
        torch.load(opened, weights_only=False) if write is torch.save else pickle.load(opened)
    assert touched.exists()


def _saved(value):
    return lambda file: torch.save(value, file)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_saved({"state_dict": {}}), "'state_dict' is a dict; needed are tensors alone"),
        (_saved(torch.ones(1)), "holds a Tensor; needed are named tensors"),
        (lambda file: file.write_bytes(b""), "cannot be read: truncated, or not a file of PyTor"),
        (lambda file: file.write_text("version https://git-lfs"), "a Git LFS pointer"),
        (lambda file: file.write_bytes(b"\x80\x02" * 99), r"PyTorch|torch\.save"),
        (lambda file: None, "no such file"),
    ],
)
def test_what_holds_no_tensors_is_refused(write, message, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    write(file)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*({message})"):
        load_torch_file(file)


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(_TENSORS, file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        for length in range(1, len(whole), 7):
            file.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match="truncated, or not a"):
                load_torch_file(file)


def test_a_dtype_that_cannot_be_saved_again_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1, dtype=torch.complex128)}, file)
    with pytest.raises(CheckpointError, match=r"'a' is stored as torch\.complex128 \(known: torc"):
        read_headers(file)

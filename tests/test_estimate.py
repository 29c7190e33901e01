"""What a worker needs, by headers alone, and what does not fit."""

import re
from dataclasses import replace

import pytest
import torch

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.estimate import Needs, Room, describe, needs, refusal, room
from tests.tiny import make_models

GIB = 2**30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return [open_checkpoint(root / name) for name in ("base", "first", "second")]


def test_sizes_are_those_of_the_tensors(models):
    base, *experts = models
    need = needs(base, experts, torch.bfloat16, 512)
    weights = base.weights()
    n_parameters = sum(tensor.numel() for tensor in weights.values())
    assert need.resident == need.saved == 2 * n_parameters
    assert need.sources == 3 * 4 * n_parameters
    assert need.moved == need.resident + need.sources
    assert need.widest == 3 * max(tensor.nbytes for tensor in weights.values())
    assert need.shard == max(f.stat().st_size for own in models for f in own.own_files.values())


def test_a_batch_holds_the_logits_of_every_token(models):
    small, large = (needs(models[0], [], torch.float32, n).activations for n in (512, 1024))
    assert large - small == 512 * 4 * (64 + 8 * 16 + 4 * 24)


LLAMA_8B = Needs(
    resident=15 * GIB,
    sources=75 * GIB,
    widest=5 * GIB,
    activations=3 * GIB,
    saved=15 * GIB,
    shard=5 * GIB,
    moved=90 * GIB,
    n_tokens=8192,
)
H100 = Room("cuda", 78 * GIB, 1, 128 * GIB, 64 * GIB, 1, 2.5e12, 5e10)
LAPTOP = Room("cpu", 30 * GIB, 1, 30 * GIB, 64 * GIB, 1, 3e10, 3e10)


@pytest.mark.parametrize(
    ("have", "where", "takes"),
    [
        (
            replace(H100, device=140 * GIB),
            "75.00 GiB, held on the device",
            "a merge moves 90.00 GiB, 0.039 s at the 2500 GB/s that this device copies",
        ),
        (
            replace(H100, host=160 * GIB),
            "75.00 GiB, streamed from page-locked memory of the host",
            "a merge moves 75.00 GiB, 1.611 s at the 50 GB/s that the host sends from page-locked "
            "memory",
        ),
        (
            H100,
            "75.00 GiB, streamed from the mapped files, which is slower",
            "a merge moves 75.00 GiB, 1.611 s at the 50 GB/s that the host sends from page-locked "
            "memory, and several times that from files",
        ),
    ],
    ids=["it fits", "it fits the host", "it fits neither"],
)
def test_base_and_experts_lie_where_there_is_room(have, where, takes):
    lines = list(describe(LLAMA_8B, have))
    assert "memory on the device: 15.00 GiB for the resident model, 3.00 GiB for 8192" in lines[0]
    assert where in lines[1]
    assert lines[-1] == f"time: {takes}"
    assert refusal(LLAMA_8B, have) == ""


REFUSED = {
    "a small device": (
        replace(H100, device=24 * GIB),
        r"on their way \(10\.00 GiB\) need 28\.00 GiB of the device, with 24\.00 GiB free; give",
    ),
    "two small devices": (
        replace(H100, device=20 * GIB, n_devices=2),
        r"need 28\.00 GiB of 2 devices, with 20\.00 GiB free",
    ),
    "a small host": (
        replace(LAPTOP, device=16 * GIB, host=16 * GIB),
        r"a batch need 20\.00 GiB of the host's memory, of which 16\.00 GiB are free",
    ),
    "many workers": (
        replace(LAPTOP, n_workers=2),
        r"host's memory \(2 workers need 20\.00 GiB each\), of which 30\.00 GiB are free",
    ),
    "a full disk": (
        replace(LAPTOP, disk=GIB),
        r"the saved model needs 15\.00 GiB of disk; 1\.00 GiB are free",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_fit_is_refused_with_the_numbers(name):
    have, message = REFUSED[name]
    assert re.search(message, refusal(LLAMA_8B, have))


def test_of_workers_elsewhere_only_the_needs_are_told():
    (line,) = describe(LLAMA_8B, None)
    assert "each worker needs 15.00 GiB for the resident model" in line
    assert "this machine has none of the workers" in line


def test_a_cpu_maps_base_and_experts(tmp_path):
    have = room("cpu", 0.0, 1, tmp_path)
    assert have.device == have.host > 0
    assert have.rate > 0
    assert "mapped: 75.00 GiB of base and experts are read" in list(describe(LLAMA_8B, have))[1]

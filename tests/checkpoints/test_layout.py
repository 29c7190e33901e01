"""What a class of transformers does with the tensors of a checkpoint."""

import pytest
import torch

from searchmerge.checkpoints.layout import ignored_when_loaded, is_buffer, layout
from searchmerge.checkpoints.tensor_files import TensorHeader
from tests.checkpoints.conftest import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_a_model_has_a_role_in_its_class(name, opened):
    checkpoint = opened(name)
    found = layout(checkpoint.path, checkpoint.headers)
    assert found.roles.keys() == checkpoint.headers.keys()
    assert not found.is_bare
    bare = layout(checkpoint.path, checkpoint.headers, "AutoModel")
    assert bare.is_bare
    assert set(bare.roles.values()) == {"model"}
    heads = {"bert": {"classifier.weight", "classifier.bias"}}
    heads["vit"] = heads["bert"]
    assert found.heads == heads.get(name, set())


def test_names_are_understood_with_and_without_the_models_name(opened):
    checkpoint = opened("gpt2")
    plain = [name.removeprefix("transformer.") for name in checkpoint.headers]
    assert layout(checkpoint.path, plain).roles.keys() == set(plain)
    assert layout(checkpoint.path, ["h.7.attn.c_attn.bias", "h.0.attn.bias"]).roles == {}


def test_a_class_that_does_not_fit_has_no_layout(opened):
    assert layout(opened("vit").path, [], "AutoModelForCausalLM") is None
    assert layout(opened("vit").path, [], "AutoModelForNothing") is None


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.attn.bias", (1, 1, 4, 4), True),
        ("h.0.attn.bias", (12,), False),
        ("h.0.attn.c_attn.bias", (12,), False),
        ("h.0.attn.masked_bias", (), True),
        ("layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("layers.0.self_attn.q_proj.weight", (4, 4), False),
    ],
)
def test_buffers_are_told_by_name_and_shape(name, shape, expected):
    assert is_buffer(name, TensorHeader(torch.float32, shape)) is expected
    assert is_buffer(name, TensorHeader(torch.int64, shape))


def test_transformers_says_what_it_passes_over(opened, capfd):
    headers = {
        name: TensorHeader(torch.float32, (1, 1, 8, 8))
        for name in ("h.0.attn.bias", "h.0.crossattention.bias", "other.weight")
    }
    found = ignored_when_loaded(opened("gpt2").path, headers)
    assert found == {"h.0.attn.bias", "h.0.crossattention.bias"}
    assert capfd.readouterr() == ("", "")

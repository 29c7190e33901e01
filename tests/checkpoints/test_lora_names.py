"""Names of an adapter's tensors are read as PEFT writes them."""

import pytest

from searchmerge.checkpoints.lora_names import (
    factor_of,
    is_inside,
    is_saved_twice,
    part_of_module,
    plain_name,
)

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("rest", "part"),
    [
        ("lora_A.weight", "A"),
        ("lora_B.weight", "B"),
        ("lora_embedding_A", "A"),
        ("lora_embedding_B", "B"),
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.weight", "magnitude"),
        ("lora_B.bias", "addend"),
        ("token_adapter.trainable_tokens_delta", "rows"),
    ],
)
def test_a_tensor_is_a_part_of_its_module(rest, part):
    key = f"base_model.model.{Q}.{rest}"
    assert part_of_module(key) == (Q, part)
    assert factor_of(key) == (Q if part in ("A", "B") else None)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"base_model.model.{Q}.base_layer.bias", f"{Q}.bias"),
        ("base_model.model.score.modules_to_save.weight", "score.weight"),
        ("base_model.model.embed.token_adapter.base_layer.weight", "embed.weight"),
        (f"{Q}.weight", f"{Q}.weight"),
    ],
)
def test_a_tensor_that_takes_the_place_of_the_bases_has_its_name(key, name):
    assert plain_name(key) == name
    assert part_of_module(key) is None


def test_what_is_within_a_layer_is_told_from_the_layer_and_from_others():
    assert is_inside(f"base_model.model.{Q}.base_layer.bias", [Q])
    assert is_inside(f"base_model.model.{Q}.lora_A.weight", ["lm_head", Q])
    assert not is_inside(f"base_model.model.{Q}.bias", [Q])
    assert not is_inside(f"base_model.model.{Q}.lora_A.weight", ["lm_head"])


def test_what_peft_saves_once_more_under_another_name_is_told():
    again, once = "score.modules_to_save.default.bias", "score.bias"
    assert is_saved_twice(again, {again, once})
    assert not is_saved_twice(again, {again})
    assert not is_saved_twice(once, {again, once})
    assert is_saved_twice("embed.original_module.weight", ())

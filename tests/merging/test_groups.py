"""Which group and depth a parameter has, by its name."""

import pytest

from searchmerge.errors import SpecError
from searchmerge.merging.groups import assign_groups, depth_positions
from searchmerge.plan import WHOLE, Groups

LLAMA = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.experts.{j}.weight" for i in range(10) for j in range(2)),
    "model.norm.weight",
]


def test_the_whole_model_is_one_group():
    assert set(assign_groups(LLAMA, WHOLE).values()) == {0}


def test_depth_makes_blocks_of_consecutive_layers():
    found = assign_groups(LLAMA, Groups(depth=3))
    layers = [found[f"model.layers.{i}.mlp.experts.1.weight"] for i in range(10)]
    assert layers == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found["model.embed_tokens.weight"] == 0
    assert found["model.norm.weight"] == found["lm_head.weight"] == 2


def test_each_stack_has_blocks_of_its_own_and_gaps_in_numbers_do_not_matter():
    names = [f"encoder.block.{i}.q" for i in (0, 5, 9, 12)] + [
        "decoder.block.0.q",
        "decoder.block.1.q",
    ]
    assert list(assign_groups(names, Groups(depth=2)).values()) == [0, 0, 1, 1, 0, 1]
    assert list(depth_positions(names).values()) == [0, 1 / 3, 2 / 3, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "is_before"),
    [
        ("transformer.wte.weight", True),
        ("shared.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("visual.positional_embedding", True),
        ("vit.embeddings.patch_embeddings.projection.bias", True),
        ("embed_out.weight", False),
        ("post_layernorm.weight", False),
        ("pooler.dense.weight", False),
        ("classifier.bias", False),
    ],
)
def test_embeddings_come_before_the_layers_and_the_rest_behind(name, is_before):
    names = ["h.0.w", "h.1.w", name]
    assert assign_groups(names, Groups(depth=2))[name] == (0 if is_before else 1)
    assert depth_positions(names)[name] == (0.0 if is_before else 1.0)


def test_more_blocks_than_layers_are_refused():
    with pytest.raises(SpecError, match="depth is 11; the model has 10 layers: 1 to 10"):
        assign_groups(LLAMA, Groups(depth=11))


def test_a_model_without_layers_has_no_depth():
    with pytest.raises(SpecError, match=r"depth is 1, but no parameter's name has a layer number"):
        assign_groups(["a.weight", "fc1.bias"], Groups(depth=1))
    with pytest.raises(
        SpecError, match=r"no parameter's name has a layer number, e.g. 'a.weight'"
    ):
        depth_positions(["a.weight"])


def test_patterns_are_searched_and_rest_takes_what_is_left():
    patterns = (r"layers\.[0-4]\.", r"layers\.[5-9]\.", "rest")
    found = assign_groups(LLAMA, Groups(patterns=patterns))
    assert found["model.layers.4.mlp.experts.0.weight"] == 0
    assert found["model.layers.5.mlp.experts.0.weight"] == 1
    assert found["lm_head.weight"] == 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("layers", "mlp", "rest"),
            r"'layers' and 'mlp' both match parameter 'model.layers.0.mlp",
        ),
        (("layers", "embed"), r"no pattern matches parameter 'lm_head.weight'; add 'rest'"),
        (("layers", "vision", "rest"), r"pattern 'vision' matches no parameter"),
        (("(", "rest"), r"'\(' is no regular expression"),
        (("rest", "layers"), r"no pattern matches parameter 'lm_head.weight'"),
    ],
)
def test_patterns_that_do_not_divide_the_model_are_refused(patterns, message):
    with pytest.raises(SpecError, match=message):
        assign_groups(LLAMA, Groups(patterns=patterns))


def test_each_tensor_may_be_a_group_of_its_own():
    names = ("b.10.w", "b.9.w", "a")
    assert assign_groups(names, Groups.of_tensors(names)) == {"b.10.w": 2, "b.9.w": 1, "a": 0}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (("a",), "no row is for parameter 'b' .1 of 2 have none.; there are rows for e.g. 'a'$"),
        (("a", "c"), "no row is for parameter 'b' .*; there are rows for e.g. 'c', which are no"),
        (("a", "b", "c"), "a row is for tensor 'c', which is no parameter that is merged"),
    ],
)
def test_groups_of_tensors_have_to_be_those_that_are_merged(tensors, message):
    with pytest.raises(SpecError, match=message):
        assign_groups(("a", "b"), Groups(tensors=tensors))

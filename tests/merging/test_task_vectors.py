"""Pairing a base with its experts, and refusing what cannot be merged."""

import logging

import pytest
import torch

from searchmerge.errors import CheckpointError, SpecError
from searchmerge.merging.merger import Merger, merge_weights
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors


def base():
    return {
        "embed.weight": torch.arange(12.0).view(4, 3),
        "layers.0.w": torch.ones(3, 3, dtype=torch.bfloat16),
        "position_ids": torch.arange(5),
    }


def expert(**changed):
    own = {name: t + 1 if t.is_floating_point() else t * 7 for name, t in base().items()}
    return own | changed


def test_dtypes_may_be_mixed_and_nothing_is_copied():
    own = {"layers.0.w": torch.full((3, 3), 1.5), "embed.weight": torch.ones(4, 3).bfloat16()}
    found = TaskVectors.from_weights(base(), {"a": expert(**own), "b": expert()})
    assert found.weights["layers.0.w"][0] is own["layers.0.w"]
    assert found.weights["embed.weight"][0] is own["embed.weight"]
    assert found.experts == ("a", "b")
    assert found.n_parameters == 21  # integers do not count


def test_what_is_no_number_of_the_model_stays_the_bases():
    merged = merge_weights(base(), {"a": expert()}, default_plan("linear", ["a"]))
    assert merged["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert merged["embed.weight"].tolist() == (base()["embed.weight"] + 1).tolist()


def test_a_missing_tensor_is_refused_and_may_be_excluded():
    own = expert()
    del own["embed.weight"]
    with pytest.raises(CheckpointError, match=r"expert .a. has no tensor .embed\.weight., which"):
        TaskVectors.from_weights(base(), {"a": own})
    found = TaskVectors.from_weights(base(), {"a": own}, exclude=["^embed"])
    assert list(found.weights) == ["layers.0.w"]


def test_another_shape_is_refused():
    message = r"'layers.0.w' has shape \(9,\) in expert 'a' but \(3, 3\) in the base"
    with pytest.raises(CheckpointError, match=message):
        TaskVectors.from_weights(base(), {"a": expert(**{"layers.0.w": torch.ones(9)})})


@pytest.mark.parametrize("n_rows", [2, 6])
def test_embeddings_of_another_vocabulary_are_merged_where_the_base_has_rows(n_rows, caplog):
    own = expert(**{"embed.weight": torch.full((n_rows, 3), 100.0, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match="or set vocabulary: base"):
        TaskVectors.from_weights(base(), {"a": own})
    with caplog.at_level(logging.WARNING):
        vectors = TaskVectors.from_weights(base(), {"a": own}, vocabulary="base")
    merged = dict(Merger(vectors).merged(default_plan("linear", ["a"])))["embed.weight"]
    n_shared = min(4, n_rows)
    assert (merged[:n_shared] == 100).all()
    assert torch.equal(merged[n_shared:], base()["embed.weight"][n_shared:])
    assert f"merged in {n_shared} of 4 rows" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_refused_by_name(bad, dtype):
    spoilt = torch.ones(3, 3, dtype=dtype)
    spoilt[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"'layers\.0\.w' of expert 'b' holds NaN or inf"):
        weights = {"a": expert(), "b": expert(**{"layers.0.w": spoilt})}
        TaskVectors.from_weights(base(), weights)
    with pytest.raises(CheckpointError, match=r"'layers\.0\.w' of the base holds NaN or inf"):
        TaskVectors.from_weights(base() | {"layers.0.w": spoilt}, {"a": expert()})


def test_a_tensor_that_only_an_expert_has_is_its_head():
    head = torch.ones(2)
    found = TaskVectors.from_weights(base(), {"a": expert(classifier=head), "b": expert()})
    assert found.heads == {"a": {"classifier": head}, "b": {}}
    assert "classifier" not in found.weights
    assert found.of(["a"]).heads == {"a": {"classifier": head}}


def tied_base():
    own = base()
    return own | {"lm_head.weight": own["embed.weight"]}


def test_tensors_that_share_storage_are_merged_once_and_stay_tied():
    own = expert()
    own["lm_head.weight"] = own["embed.weight"].clone()
    vectors = TaskVectors.from_weights(tied_base(), {"a": own})
    assert vectors.tied == {"lm_head.weight": "embed.weight"}
    assert vectors.n_parameters == 21
    merged = merge_weights(tied_base(), {"a": own}, default_plan("linear", ["a"]))
    assert list(merged) == list(tied_base())
    assert merged["lm_head.weight"].data_ptr() == merged["embed.weight"].data_ptr()
    assert torch.equal(merged["lm_head.weight"], own["embed.weight"])


def test_an_expert_may_hold_a_tied_tensor_under_its_other_name():
    own = expert()
    own["lm_head.weight"] = own.pop("embed.weight")
    vectors = TaskVectors.from_weights(base(), {"a": own}, tied={"lm_head.weight": "embed.weight"})
    assert vectors.weights["embed.weight"][0] is own["lm_head.weight"]
    assert vectors.heads == {"a": {}}


def test_what_an_expert_has_apart_is_a_parameter_to_itself():
    own = expert(**{"lm_head.weight": torch.full((4, 3), 9.0)})
    experts = {"a": own, "tied": expert()}
    vectors = TaskVectors.from_weights(tied_base(), experts)
    assert vectors.tied == {}
    assert vectors.n_parameters == 33
    for name, plain in (("a", own["lm_head.weight"]), ("tied", base()["embed.weight"] + 1)):
        merged = merge_weights(tied_base(), experts, default_plan("linear", [name]))
        assert torch.equal(merged["lm_head.weight"], plain)
        assert torch.equal(merged["embed.weight"], base()["embed.weight"] + 1)
    named = {"lm_head.weight": "embed.weight"}
    assert set(TaskVectors.from_weights(base(), experts, tied=named).weights) == set(
        vectors.weights
    )


def test_a_resident_model_that_ties_what_is_apart_is_refused():
    own = expert(**{"lm_head.weight": torch.zeros(4, 3)})
    vectors = TaskVectors.from_weights(tied_base(), {"a": own})
    targets = {name: tensor.clone() for name, tensor in base().items()}
    with pytest.raises(SpecError, match=r"ties 'lm_head\.weight' to 'embed\.weight', which an"):
        Merger(vectors, targets=targets | {"lm_head.weight": targets["embed.weight"]})


def test_an_unknown_expert_is_refused():
    vectors = TaskVectors.from_weights(base(), {"a": expert()})
    with pytest.raises(SpecError, match=r"expert 'b' is not loaded \(there are: a\)"):
        vectors.of(["b"])


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular"), ("vision", "matches no")])
def test_a_pattern_that_excludes_nothing_is_refused(pattern, message):
    with pytest.raises(SpecError, match=message):
        TaskVectors.from_weights(base(), {"a": expert()}, exclude=[pattern])


def test_an_integer_in_place_of_a_number_is_refused():
    with pytest.raises(CheckpointError, match="both must be floating point"):
        weights = expert(**{"layers.0.w": torch.ones(3, 3, dtype=torch.int8)})
        TaskVectors.from_weights(base(), {"a": weights})


def test_no_expert_is_refused():
    with pytest.raises(CheckpointError, match="there is no expert"):
        TaskVectors.from_weights(base(), {})


def test_an_expert_equal_to_the_base_is_told():
    vectors = TaskVectors.from_weights(base(), {"a": expert(), "same": base()})
    assert [vectors.is_zero(name) for name in vectors.experts] == [False, True]

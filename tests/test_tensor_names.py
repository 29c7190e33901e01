import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.errors import SpecError
from searchmerge.tensor_names import compress, expand, in_order

parts = st.sampled_from(["w", "layer", "0", "1", "2", "10", "11", "007", "q.bias"])
names = st.sets(st.lists(parts, min_size=1, max_size=4).map(".".join))


@given(names)
def test_what_is_compressed_expands_to_the_same_names(names):
    expanded = [name for pattern in compress(names) for name in expand(pattern)]
    assert len(expanded) == len(set(expanded))
    assert set(expanded) == names


def test_layers_become_one_line_and_other_names_stay():
    names = [f"layers.{i}.mlp.w" for i in (0, 1, 2, 5, 7, 8)] + ["layers.3.q", "norm.w"]
    assert compress(names) == ["layers.{0..2,5,7..8}.mlp.w", "layers.3.q", "norm.w"]


def test_braces_may_stand_twice():
    assert expand("l.{0..1}.e.{3,5}.w") == ["l.0.e.3.w", "l.0.e.5.w", "l.1.e.3.w", "l.1.e.5.w"]


def test_names_are_in_the_order_of_their_numbers():
    assert in_order(["b.10", "b.9", "a.x", "b.9.2", "b"]) == ("a.x", "b", "b.9", "b.9.2", "b.10")


@pytest.mark.parametrize("pattern", ["w.{0..99999999}", "w.{0..999}.{0..999}"])
def test_a_pattern_of_more_names_than_a_model_has_is_refused(pattern):
    with pytest.raises(SpecError, match=r"stands for .* tensors; allowed are up to 100000"):
        expand(pattern)

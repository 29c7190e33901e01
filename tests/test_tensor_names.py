import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.errors import SpecError
from searchmerge.tensor_names import compress, expand, in_order

parts = st.sampled_from(["w", "layer", "0", "1", "2", "10", "11", "007", "q.bias"])
signs = st.text(
    "{}0129.,*[]()'\"-:#&!|>%@`~<= \\\t\nw\u00e9\u0663\u00b2\u2028\ufeff\U0001f600", max_size=12
)
braced = st.from_regex(r"[a{.]{0,3}\{(0|3|007|1\.\.3|2,5)\}[}.b]{0,3}", fullmatch=True)
any_name = st.one_of(
    st.lists(parts, min_size=1, max_size=4).map(".".join),
    st.lists(st.one_of(parts, braced), min_size=1, max_size=4).map(".".join),
    st.lists(braced, min_size=1, max_size=3).map("".join),
    signs,
    st.text(max_size=6),
)
"""As models have them, with a layer's number; with braces around numbers; of any characters."""
names = st.sets(any_name)


@given(names)
def test_what_is_compressed_expands_to_the_same_names(names):
    expanded = [name for pattern in compress(names) for name in expand(pattern)]
    assert len(expanded) == len(set(expanded))
    assert set(expanded) == names


def test_layers_become_one_line_and_other_names_stay():
    names = [f"layers.{i}.mlp.w" for i in (0, 1, 2, 5, 7, 8)] + ["layers.3.q", "norm.w"]
    assert compress(names) == ["layers.{0..2,5,7..8}.mlp.w", "layers.3.q", "norm.w"]


def test_numbers_in_braces_that_are_part_of_a_name_have_braces_twice():
    names = [f"{{x}}.{i}.w{{3}}" for i in range(3)] + ["layers{3}.w", "{{0..1,4}}"]
    patterns = compress(names)
    assert patterns == ["layers{{3}}.w", "{x}.{0..2}.w{{3}}", "{{{0..1,4}}}"]
    assert [name for pattern in patterns for name in expand(pattern)] == [
        "layers{3}.w", "{x}.0.w{3}", "{x}.1.w{3}", "{x}.2.w{3}", "{{0..1,4}}"
    ]  # fmt: skip


def test_braces_may_stand_twice():
    assert expand("l.{0..1}.e.{3,5}.w") == ["l.0.e.3.w", "l.0.e.5.w", "l.1.e.3.w", "l.1.e.5.w"]


def test_names_are_in_the_order_of_their_numbers():
    assert in_order(["b.10", "b.9", "a.x", "b.9.2", "b"]) == ("a.x", "b", "b.9", "b.9.2", "b.10")


@pytest.mark.parametrize("pattern", ["w.{0..99999999}", "w.{0..999}.{0..999}"])
def test_a_pattern_of_more_names_than_a_model_has_is_refused(pattern):
    with pytest.raises(SpecError, match=r"stands for .* tensors; allowed are up to 100000"):
        expand(pattern)

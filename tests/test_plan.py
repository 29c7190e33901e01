import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.errors import SpecError
from searchmerge.plan import Groups, MergePlan
from tests.test_tensor_names import any_name

DATA = {
    "method": "ties",
    "experts": ["math", "code"],
    "groups": "whole",
    "values": {"coefficient": [[0.7, 0.9]], "density": [[0.2, 0.3]]},
    "settings": {"aggregate": "mean"},
}
numbers = st.floats(-1e6, 1e6)
TENSORS = Groups.of_tensors([f"layers.{i}.{kind}" for i in range(11) for kind in ("q", "norm")])
groups = st.sampled_from([Groups(), Groups(depth=3), Groups(patterns=("attn", "rest")), TENSORS])


@st.composite
def plans(draw):
    chosen = draw(groups)
    experts = tuple(
        draw(st.lists(st.text("abc", min_size=1), min_size=1, max_size=3, unique=True))
    )
    row = st.tuples(*[numbers] * len(experts))
    rows = st.tuples(*[row] * len(chosen))
    return MergePlan("ties", experts, {"coefficient": draw(rows)}, chosen, {"aggregate": "sum"})


@given(plans())
def test_dict_and_yaml_give_the_plan_back(plan):
    assert MergePlan.from_dict(plan.to_dict()) == plan
    assert MergePlan.from_yaml(plan.to_yaml()) == plan
    assert MergePlan.from_yaml(plan.to_yaml()).digest == plan.digest


def test_a_plan_that_is_made_from_another_has_a_digest_of_its_own():
    plan = MergePlan.from_dict(DATA)
    assert plan.digest == pickle.loads(pickle.dumps(plan)).digest
    turned = plan.reordered(("code", "math"))
    assert turned.digest == MergePlan.from_dict(turned.to_dict()).digest != plan.digest
    assert turned.reordered(plan.experts) == plan
    assert repr(plan) == repr(MergePlan.from_dict(DATA))  # that was never asked for its digest


def test_the_documented_file_format_is_read_and_written(tmp_path):
    text = """
method: ties
experts: [math, code]
groups: {depth: 2}
values: {coefficient: [[0.7, 9e-1], [1, 0.5]], density: [[0.2, 0.3], [0.1, 0.2]]}
settings: {aggregate: mean}
"""
    plan = MergePlan.from_yaml(text)
    assert plan.groups == Groups(depth=2)
    assert plan.values["coefficient"] == ((0.7, 0.9), (1.0, 0.5))
    file = tmp_path / "plan.yaml"
    plan.to_yaml(file)
    assert MergePlan.from_yaml(file) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metod": "ties"}, "unknown key 'metod'"),
        ({"values": None}, "a mapping of name to rows"),
        (
            {"values": {"density": [[0.1]]}},
            "a row of values.density has 1 number; it has",
        ),
        ({"values": {"density": [[0.1, 0.2]] * 2}}, "values.density has 2 rows; .* need 1"),
        ({"values": {"density": [[0.1, "x"]]}}, r"values.density: row 1 is .0.1, 'x'.; a list"),
        ({"values": {"density": [[0.1, True]]}}, "values.density: row 1 is .0.1, True."),
        ({"values": {"density": [[0.1, float("nan")]]}}, "of expert 'code' is nan, not finite"),
        ({"experts": "math"}, "experts is 'math'"),
        ({"experts": []}, "experts is empty"),
        ({"experts": ["a", "a"]}, "an expert is listed twice"),
        ({"groups": {"depth": 0}}, "depth is 0"),
        ({"groups": {"depth": 2, "patterns": ["a"]}}, "allowed: whole"),
        ({"groups": "half"}, "found 'half'; allowed: whole"),
        ({"settings": {"aggregate": ["mean"]}}, "settings.aggregate"),
        ({"settings": []}, r"settings is \[\]; a mapping is needed"),
        ({"method": 3}, "method is 3; a name is needed"),
        ({"experts": ["math", 7]}, r"experts is \['math', 7\]; a list of names"),
        ({"values": {"density": ["12"]}}, "values.density: row 1 is '12'"),
        ({"values": {"density": [[0.1, 10**400]]}}, "values.density: row 1 is .0.1, 1000"),
        ({"groups": {"patterns": ["a", 1]}}, "allowed: whole"),
        ({"groups": {"depth": 10**9}}, "depth is 1000000000; allowed is 1 to 1000"),
    ],
)
def test_a_plan_that_is_not_one_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        MergePlan.from_dict({**DATA, **change})


def test_a_file_that_holds_no_plan_is_named(tmp_path):
    file = tmp_path / "plan.yaml"
    with pytest.raises(SpecError, match=r"plan\.yaml: cannot be read: No such file"):
        MergePlan.from_yaml(file)
    file.write_text("method: [")
    with pytest.raises(SpecError, match=r"plan\.yaml:1: not valid YAML"):
        MergePlan.from_yaml(file)
    file.write_text("method: ties\nexperts: [a]\n")
    with pytest.raises(SpecError, match=r"plan\.yaml: plan: key 'values' is missing"):
        MergePlan.from_yaml(file)
    file.write_text(
        "method: ties\nexperts: [a]\nvalues:\n  density: [[0.2]]\n  coefficient: [x]\n"
    )
    with pytest.raises(SpecError, match=r"plan\.yaml:5: plan: values\.coefficient: row 1 is 'x'"):
        MergePlan.from_yaml(file)
    file.write_bytes("method: tiés".encode("latin-1"))
    with pytest.raises(SpecError, match=r"plan\.yaml:1: is not UTF-8 text \(byte 0xe9\)"):
        MergePlan.from_yaml(file)


@pytest.mark.parametrize(
    "name", ["1e3", "010", "no", "1:30", "2024-01-01", "=", "~", "[/x]", "a\nb"]
)
def test_names_that_look_like_something_else_are_read_back_as_they_are(tmp_path, name):
    plan = MergePlan("ties", (name, "b"), {"density": ((0.1, 1e-7),)}, settings={"kind": name})
    plan.to_yaml(tmp_path / "plan.yaml")
    assert MergePlan.from_yaml(tmp_path / "plan.yaml") == plan
    assert MergePlan.from_dict(yaml.safe_load(plan.to_yaml())) == plan


def test_a_plan_in_another_order_of_experts_keeps_each_ones_numbers():
    plan = MergePlan.from_dict(DATA).reordered(("code", "math"))
    assert plan.experts == ("code", "math")
    assert plan.values == {"coefficient": ((0.9, 0.7),), "density": ((0.3, 0.2),)}
    assert plan.reordered(("math", "code")) == MergePlan.from_dict(DATA)


def test_a_plan_with_a_row_per_tensor_is_as_short_as_its_rows_differ():
    rows = tuple((1.0, 0.5 if name == "layers.3.q" else 1.0) for name in TENSORS.tensors)
    densities = ((0.2, 0.2),) * len(TENSORS)
    values = {"coefficient": rows, "density": densities}
    plan = MergePlan("ties", ("math", "code"), values, TENSORS)
    assert plan.to_dict()["groups"] == "tensor"
    assert plan.to_dict()["values"] == {
        "coefficient": {
            "layers.3.q": [1.0, 0.5],
            "layers.{0..10}.norm": [1.0, 1.0],
            "layers.{0..2,4..10}.q": [1.0, 1.0],
        },
        "density": {"rest": [0.2, 0.2]},
    }
    assert MergePlan.from_yaml(plan.to_yaml()) == plan


@given(st.sets(any_name | st.sampled_from(["rest", "", "1e3", "<<", "null", "x" * 2000])))
def test_a_plan_of_tensors_with_any_names_is_read_as_it_was_written(names):
    groups = Groups.of_tensors({*names, "layers{3}.w"})
    rows = tuple((1.0, float(i % 3 == 0)) for i in range(len(groups)))
    values = {"coefficient": rows, "density": tuple((0.2, second) for _, second in rows)}
    plan = MergePlan("ties", ("math", "code"), values, groups)
    assert MergePlan.from_yaml(plan.to_yaml()) == plan
    assert MergePlan.from_dict(plan.to_dict()) == plan


def test_a_tensor_that_is_called_rest_is_no_row_of_all_others():
    groups = Groups.of_tensors(["rest", "a", "b"])
    values = {"coefficient": ((1.0, 1.0),) * 3, "density": ((0.2, 0.2), (0.2, 0.2), (0.5, 0.5))}
    plan = MergePlan("ties", ("math", "code"), values, groups)
    assert plan.to_dict()["groups"] == "named tensor"
    assert plan.to_dict()["values"]["density"] == {
        "a": [0.2, 0.2],
        "b": [0.2, 0.2],
        "rest": [0.5, 0.5],
    }
    data = plan.to_dict()
    del data["values"]["density"]["a"]
    with pytest.raises(SpecError, match=r"no row for tensor 'a'; give one$"):
        MergePlan.from_dict(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coefficient": [[1.0, 1.0]]}, "groups: tensor needs values of the form"),
        ({"coefficient": {"rest": [1.0, 1.0]}}, "values name no tensor"),
        ({"coefficient": {"l.{0..2}": [1, 1], "l.1": [0, 1]}}, "two rows for tensor 'l.1'"),
        ({"coefficient": {"a": [1, 1]}, "density": {"b": [1, 1]}}, "no row for tensor 'b'"),
        ({"coefficient": {"a": [1.0]}}, "a row of values.coefficient has 1 number;"),
        ({"coefficient": {"a": "much"}}, "one row per group"),
        ({"coefficient": {"a": [1, 1], "l.{0..9}": [1, "x"]}}, r"values.coefficient: the row of "),
        ({"coefficient": {"a": [1, 1], "b": [[1, 1]]}}, r"the row of b is \[\[1, 1\]\]; a list"),
        ({"coefficient": {"a": [1, 1], "b": [1]}}, r"row of values.coefficient .group 'b'. has 1"),
    ],
)
def test_rows_of_tensors_that_do_not_fit_are_refused(values, message):
    with pytest.raises(SpecError, match=message):
        MergePlan.from_dict({**DATA, "groups": "tensor", "values": values})


def test_rows_that_name_tensors_where_groups_are_others_are_refused():
    rows = {"coefficient": {f"layers.{i}.q": [1.0, 1.0] for i in range(999)}}
    with pytest.raises(SpecError, match="names what its rows are for") as refused:
        MergePlan.from_dict({**DATA, "groups": "whole", "values": rows})
    assert len(str(refused.value)) < 200


def test_tensors_have_one_order():
    with pytest.raises(SpecError, match="in another order than theirs"):
        Groups(tensors=("b", "a"))

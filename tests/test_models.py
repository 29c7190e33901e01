"""The models of a study are opened, checked and saved together."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from searchmerge.errors import CheckpointError, SpecError
from searchmerge.merging.merger import Merger, merge_weights
from searchmerge.merging.method import default_plan
from searchmerge.models import (
    check_groups,
    load_task_vectors,
    merged_here,
    merged_names,
    open_models,
    save_merge,
)
from searchmerge.plan import Groups, MergePlan
from searchmerge.study import read_study
from searchmerge.watch import Watch
from tests.tiny import EXPERTS, make_study

SOME = {"low": 0.1, "high": 0.9}


@pytest.fixture
def study(models, tmp_path):
    for name in ("base", *EXPERTS):
        (tmp_path / name).symlink_to(models / name)
    return lambda **changes: read_study(make_study(tmp_path, **changes))


def test_experts_are_opened_in_the_studys_order(study):
    opened = open_models(study(experts={"b": "second", "a": "first"}))
    assert list(opened.experts) == ["b", "a"]
    assert opened.sources["a"].endswith("first")
    assert opened.fingerprints().keys() == {"base", "b", "a"}
    assert len(set(opened.fingerprints().values())) == 3


@pytest.mark.parametrize(
    ("changes", "dtype"), [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)]
)
def test_models_have_the_dtype_of_the_base_or_the_studys(study, changes, dtype):
    assert open_models(study(**changes)).dtype == dtype


def test_models_that_do_not_fit_are_refused_before_anything_is_loaded(study, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in (tmp_path / "first").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[8\]"):
        open_models(study(experts={"a": "other", "b": "second"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"method": "ties", "groups": {"depth": 3}, "density": SOME}},
            "space 'ties': .*depth is 3; the model has 2 layers",
        ),
        ({"exclude": ["weight"]}, "exclude: .*leaves no parameter to be merged"),
    ],
)
def test_groups_are_checked_by_the_bases_headers(study, changes, message):
    wrong = study(**changes)
    with pytest.raises(SpecError, match=message):
        check_groups(wrong, open_models(wrong))


def test_what_is_saved_is_the_plans_merge_with_the_plan_beside_it(study, tmp_path):
    told = study(exclude=["norm"])
    opened = open_models(told)
    plan = default_plan("ties", EXPERTS, coefficient=[0.5, 1.5])
    vectors, check = load_task_vectors(told, opened), Watch(opened).check
    save_merge(
        opened,
        merged_here(opened, vectors, plan),
        plan,
        tmp_path / "out",
        files={"a/b": "c"},
        check=check,
    )
    assert (tmp_path / "out" / "a" / "b").read_text() == "c"
    base, *experts = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", *EXPERTS)
    )
    kept = {name: tensor for name, tensor in base.items() if "norm" in name}
    merged = {name: tensor for name, tensor in base.items() if "norm" not in name}
    expected = kept | merge_weights(merged, dict(zip(EXPERTS, experts, strict=True)), plan)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert yaml.safe_load((tmp_path / "out" / "merge_plan.yaml").read_text())["method"] == "ties"


@pytest.mark.parametrize("changes", [{}, {"exclude": ["norm"]}])
def test_what_is_merged_is_known_by_name_before_anything_is_mapped(study, changes):
    asked = study(**changes)
    opened = open_models(asked)
    assert merged_names(opened) == list(load_task_vectors(asked, opened).weights)
    assert "lm_head.weight" not in merged_names(opened)  # it is tied


def test_a_plan_with_a_row_for_every_tensor_is_saved_and_read_again(study, tmp_path):
    asked = study()
    opened = open_models(asked)
    vectors, groups = load_task_vectors(asked, opened), Groups.of_tensors(merged_names(opened))
    plan = default_plan("ties", EXPERTS, groups=groups, density=0.5)
    save_merge(
        opened,
        merged_here(opened, vectors, plan),
        plan,
        tmp_path / "out",
        files={},
        check=lambda: None,
    )
    assert MergePlan.from_yaml(tmp_path / "out" / "merge_plan.yaml") == plan
    merged = load_file(tmp_path / "out" / "model.safetensors")
    whole = dict(Merger(vectors).merged(default_plan("ties", EXPERTS, density=0.5)))
    for name, tensor in merged.items():
        assert torch.equal(tensor, whole[name])

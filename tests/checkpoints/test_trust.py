"""Checkpoints with Python code of their own: it runs where a study says so, and nowhere else."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from typer.testing import CliRunner

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.compatibility import check_compatible
from searchmerge.checkpoints.model_config import load_config
from searchmerge.checkpoints.resident import load_resident
from searchmerge.classifier import load_classifier
from searchmerge.cli import app
from searchmerge.errors import CheckpointError, SpecError
from searchmerge.evaluators.tokenizer import load_tokenizer
from tests.tiny import make_models

_CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({touched!r}).touch()

class ToyConfig(LlamaConfig):
    model_type = "toy"
    factor: float = 1.0
"""
_MODELING = """
from transformers import LlamaForCausalLM
from .configuration_toy import ToyConfig

class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.factor
        return output
"""
_TOKENIZATION = """
from .configuration_toy import ToyConfig
from transformers import PreTrainedTokenizerFast

class ToyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def touched(tmp_path, monkeypatch):
    """Save models whose code touches a file; return the file."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    for module in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("something asked on stdin"))
    make_models(tmp_path)
    touched = tmp_path / "touched"
    for name in ("base", "first", "second"):
        folder = tmp_path / name
        (folder / "configuration_toy.py").write_text(_CONFIGURATION.format(touched=str(touched)))
        (folder / "modeling_toy.py").write_text(_MODELING)
        (folder / "tokenization_toy.py").write_text(_TOKENIZATION)
        _edit(
            folder / "config.json",
            model_type="toy",
            factor=2.0,
            architectures=["ToyForCausalLM"],
            auto_map={
                "AutoConfig": "configuration_toy.ToyConfig",
                "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
            },
        )
        _edit(
            folder / "tokenizer_config.json",
            tokenizer_class="ToyTokenizer",
            auto_map={"AutoTokenizer": [None, "tokenization_toy.ToyTokenizer"]},
        )
    return touched


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


_WANTS = r"it needs Python code that comes with it, which is not run; allow that with `trust_rem"


def test_nothing_of_a_checkpoint_runs_unless_the_study_says_so(touched, tmp_path):
    base, expert = (open_checkpoint(tmp_path / name) for name in ("base", "first"))
    check_compatible(base, {"first": expert})
    with pytest.raises(CheckpointError, match=rf"base: cannot be loaded as .*: {_WANTS}"):
        load_resident(base, dtype=torch.float32, device="cpu")
    with pytest.raises(CheckpointError, match=rf"base: config\.json: {_WANTS}"):
        load_config(tmp_path / "base")
    with pytest.raises(SpecError, match=rf"base.*: the tokenizer cannot be loaded: {_WANTS}"):
        load_tokenizer(tmp_path / "base")
    assert not touched.exists()


def test_a_configuration_of_its_own_is_compared_without_code_too(touched, tmp_path):
    _edit(tmp_path / "first" / "config.json", factor=3.0)
    for trust in (False, True):
        base, expert = (
            open_checkpoint(tmp_path / name, trust_remote_code=trust) for name in ("base", "first")
        )
        with pytest.raises(
            CheckpointError, match=r"has factor 3\.0 in its config\.json; the base"
        ):
            check_compatible(base, {"first": expert})
        assert touched.exists() == trust


def test_a_model_with_code_of_its_own_is_merged_and_saved(touched, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("method: linear\nexperts: [first]\nvalues: {coefficient: [[1.0]]}\n")
    out = tmp_path / "out"
    arguments = ["merge", str(plan), "--base", str(tmp_path / "base"), "--out", str(out)]
    arguments += ["--expert", f"first={tmp_path / 'first'}"]
    done = CliRunner().invoke(app, arguments)  # merging runs nothing
    assert done.exit_code == 0, done.output
    assert not touched.exists()
    done = CliRunner().invoke(app, [*arguments, "--set", "trust_remote_code=true"])
    assert done.exit_code == 0, done.output
    assert touched.exists()
    tokens = torch.arange(2, 8).unsqueeze(0)
    saved, first, resident = (
        transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True),
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "first", trust_remote_code=True
        ),
        load_resident(
            open_checkpoint(out, trust_remote_code=True), dtype=torch.float32, device="cpu"
        ),
    )
    assert torch.equal(saved(tokens).logits, first(tokens).logits)
    assert torch.equal(resident(tokens).logits, first(tokens).logits)
    tokenizer = load_tokenizer(out, trust_remote_code=True)
    assert type(tokenizer).__name__ == "ToyTokenizer"


def test_a_saved_classifier_runs_no_code_of_its_own_either(touched, tmp_path):
    heads = tmp_path / "base" / "heads"
    heads.mkdir()
    recipe = {"expert": "first", "model_class": "AutoModelForCausalLM", "id2label": {"0": "a"}}
    (heads / "first.json").write_text(json.dumps(recipe))
    shutil.copy(tmp_path / "first" / "model.safetensors", heads / "first.safetensors")
    with pytest.raises(CheckpointError, match=_WANTS):
        load_classifier(tmp_path / "base", "first")
    assert not touched.exists()

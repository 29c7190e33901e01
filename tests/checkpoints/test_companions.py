"""What is saved beside a merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.companions import companions, module_folders
from searchmerge.checkpoints.writer import save_model
from searchmerge.errors import CheckpointError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Norm"},
]
SAVED = {
    "modules.json": json.dumps(MODULES),
    "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": '{"max_seq_length": 24}',
    "sentence_distilbert_config.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": '{"in_features": 16}',
    "2_Dense/inner/words.txt": "a",
    "additional_chat_templates/tool.jinja": "x",
    "tokenizer_config.json": "{}",
}
LEFT = (
    "README.md",
    ".git/config",
    ".cache/huggingface/x.lock",
    "1_Other/config.json",
    "2_Dense/pytorch_model.bin",
    "2_Dense/tf_model.h5",
    "2_Dense/.hidden",
    "2_Dense/optimizer.pt",
    "checkpoint-5/config.json",
    "onnx/model.onnx",
    "optimizer.pt",
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.gguf",
    "rust_model.ot",
    "training_args.bin",
    "trainer_state.json",
)


@pytest.fixture
def encoder(save, tmp_path):
    """Return the folder of a sentence encoder with all that such folders hold."""
    folder = Path(shutil.copytree(save("bert"), tmp_path / "base"))
    for name, text in {**SAVED, **dict.fromkeys(LEFT, "left")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "3_Normalize").mkdir()
    save_file({"linear.weight": torch.ones(4, 16)}, folder / "2_Dense" / "model.safetensors")
    return folder


def test_a_sentence_encoder_is_saved_with_its_modules_and_nothing_else(
    encoder, tmp_path, cache_dir
):
    base = open_checkpoint(encoder, cache_dir=cache_dir)
    out = tmp_path / "out"
    save_model([], out, like=base, dtype=torch.float32)
    assert {name: (out / name).read_text() for name in SAVED} == SAVED
    dense = load_file(out / "2_Dense" / "model.safetensors")
    assert torch.equal(dense["linear.weight"], torch.ones(4, 16))
    expected = {*SAVED, "2_Dense/model.safetensors", "config.json", "model.safetensors"}
    assert {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} == expected
    assert transformers.AutoModelForSequenceClassification.from_pretrained(out).classifier
    assert set(open_checkpoint(out, cache_dir=cache_dir).headers) == set(base.headers)


def test_a_module_in_pytorchs_format_alone_is_kept(encoder):
    (encoder / "2_Dense" / "model.safetensors").unlink()
    assert Path("2_Dense/pytorch_model.bin") in companions(encoder)


def test_the_companions_are_whole_or_not_there(encoder, tmp_path, cache_dir):
    base = open_checkpoint(encoder, cache_dir=cache_dir)
    (encoder / "2_Dense" / "config.json").unlink()
    (encoder / "2_Dense" / "config.json").symlink_to("gone")
    (encoder / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"modules\.json: is no list of modules"):
        save_model([], tmp_path / "out", like=base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("{}", None),
        ("3", "is no list of modules"),
        ('["x"]', "is no list of modules"),
        ('[{"idx": 1}]', "is no list of modules, each with its path: KeyError"),
        ("[" * 100_000, "is no list of modules"),
        ('[{"path": "../secrets"}]', r"path '\.\./secrets' is not within the model's folder"),
        ('[{"path": "/etc"}]', r"path '/etc' is not within the model's folder"),
        ('[{"path": "a\\\\b"}]', r"is not within the model's folder"),
    ],
)
def test_modules_that_cannot_be_followed_are_refused(modules, message, tmp_path):
    (tmp_path / "modules.json").write_text(modules)
    if message is None:
        assert module_folders(tmp_path) == []
        return
    with pytest.raises(CheckpointError, match=rf"modules\.json: .*{message}"):
        companions(tmp_path)


def test_a_model_without_modules_has_none(save):
    assert module_folders(save("llama")) == []
    assert {str(file) for file in companions(save("llama"))} == {
        "config.json",
        "generation_config.json",
    }

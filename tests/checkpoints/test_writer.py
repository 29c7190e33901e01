import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.writer import save_model
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES

_PLAN = {"merge_plan.yaml": "method: linear\n"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 4_000])
def test_a_saved_model_loads_with_equal_weights(name, opened, tmp_path, max_shard_bytes):
    base, expert = opened(name), opened(name, 1)
    stream = ((key, expert.weights()[key]) for key in reversed(expert.headers))
    save_model(stream, tmp_path / "out", like=base, max_shard_bytes=max_shard_bytes)
    loader = getattr(transformers, ARCHITECTURES[name].auto_class)
    found, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = loader.from_pretrained(expert.path).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    n_files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert (n_files > 1) == (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert (n_files > 1) == (max_shard_bytes == 4_000)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_saved_model_opens_again(opened, tmp_path, cache_dir):
    base, expert = opened("llama"), opened("llama", 1)
    save_model(expert.weights().items(), tmp_path / "out", like=base, max_shard_bytes=9_000)
    again = open_checkpoint(tmp_path / "out", cache_dir=cache_dir)
    assert again.fingerprint() == expert.fingerprint()
    assert again.headers == expert.headers


def test_what_is_not_given_is_the_bases(save, tmp_path, cache_dir):
    directory = Path(shutil.copytree(save("llama"), tmp_path / "base"))
    stored = load_file(directory / "model.safetensors")
    stored |= {"model.steps": torch.arange(3), "model.mask": torch.tensor([True, False])}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(directory, cache_dir=cache_dir)
    norm = torch.full((16,), 2.0)
    save_model([("model.norm.weight", norm)], tmp_path / "out", like=base, dtype=torch.float16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys()
    assert torch.equal(found["model.steps"], stored["model.steps"])
    assert torch.equal(found["model.mask"], stored["model.mask"])
    assert torch.equal(found["lm_head.weight"], stored["lm_head.weight"].half())
    assert torch.equal(found["model.norm.weight"], norm.half())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_dtype_is_that_asked_for_and_the_configuration_says_it(
    key, save, opened, tmp_path, cache_dir
):
    directory = Path(shutil.copytree(save("llama"), tmp_path / "base"))
    config = json.loads((directory / "config.json").read_text())
    del config["dtype"]
    config |= {key: "float32"} if key else {}
    (directory / "config.json").write_text(json.dumps(config))
    base = open_checkpoint(directory, cache_dir=cache_dir)
    save_model([], tmp_path / "out", like=base, dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved == config | {key or "dtype": "bfloat16"}


def test_weights_are_rounded_once_from_float32(opened, tmp_path):
    base = opened("llama", dtype="bfloat16")
    exact = {name: tensor.double() / 3 for name, tensor in base.weights().items()}
    weights = ((name, tensor.float()) for name, tensor in exact.items())
    save_model(weights, tmp_path / "out", like=base)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(tensor, exact[name].float().to(base.headers[name].dtype))
        for name, tensor in found.items()
    )


def test_a_tied_embedding_that_is_stored_twice_is_written_twice(save, tmp_path, cache_dir):
    directory = Path(shutil.copytree(save("llama_tied"), tmp_path / "base"))
    stored = load_file(directory / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(directory, cache_dir=cache_dir)
    merged = stored["model.embed_tokens.weight"] * 2
    given = [("model.embed_tokens.weight", merged), ("lm_head.weight", stored["lm_head.weight"])]
    save_model(given, tmp_path / "out", like=base)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], merged)
    assert torch.equal(found["model.embed_tokens.weight"], merged)


def test_views_and_devices_of_any_layout_can_be_saved(opened, tmp_path):
    base = opened("llama")
    transposed = torch.arange(16 * 24.0).view(16, 24).T
    name = "model.layers.0.mlp.up_proj.weight"
    save_model([(name, transposed)], tmp_path / "out", like=base)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], transposed)


def test_everything_that_belongs_to_a_model_is_copied(save, tmp_path, cache_dir):
    directory = Path(shutil.copytree(save("llama"), tmp_path / "base"))
    copied = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
              "chat_template.jinja", "modeling_own.py", "tokenizer.model", "LICENSE")  # fmt: skip
    left = ("README.md", "merge_plan.yaml", "training_args.bin", "trainer_state.json")
    for name in (*copied, *left):
        (directory / name).write_text(name)
    base = open_checkpoint(directory, cache_dir=cache_dir)
    extra = {"README.md": "# β", ".eval_results/task.yaml": "[]"}
    save_model([], tmp_path / "out", like=base, extra_files=extra)
    out = tmp_path / "out"
    assert all((out / name).read_text() == name for name in copied)
    assert (out / "generation_config.json").exists()
    assert (out / "README.md").read_text(encoding="utf-8") == "# β"
    assert (out / ".eval_results" / "task.yaml").read_text() == "[]"
    assert not any((out / name).exists() for name in left[1:])


def test_a_model_that_was_saved_before_is_replaced(opened, tmp_path):
    out = tmp_path / "runs" / "study" / "model"
    one, two = opened("llama", 1), opened("llama", 2)
    save_model(one.weights().items(), out, like=opened("llama"), extra_files=_PLAN)
    (out / "old.txt").write_text("")
    save_model(two.weights().items(), out, like=opened("llama"), extra_files=_PLAN)
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], two.weights()["lm_head.weight"])
    assert not (out / "old.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_another_directory_is_never_replaced(opened, save, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "precious.txt").write_text("")
    with pytest.raises(
        CheckpointError, match=r"model: is not empty, and not a model that was sav"
    ):
        save_model([], out, like=opened("llama"))
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    with pytest.raises(CheckpointError, match=r"precious\.txt: is a file; a directory is needed"):
        save_model([], out / "precious.txt", like=opened("llama"))
    with pytest.raises(CheckpointError, match=r"x: cannot be written: .* needed, .* free"):
        save_model([], out / "precious.txt" / "x", like=opened("llama"))
    (out / "precious.txt").unlink()
    save_model([], out, like=opened("llama"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("model.other", torch.ones(2)), r"'model\.other' cannot be saved: .* has no such tensor"),
        (("model.norm.weight", torch.ones(2)), r"its shape is \[2\]; \[16\] in"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(given, message, opened, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save_model([given], tmp_path / "out", like=opened("llama"))
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_weights_leaves_the_former_model_whole(opened, tmp_path):
    base, out = opened("llama"), tmp_path / "out"
    save_model([], out, like=base, extra_files=_PLAN)

    def weights():
        yield "model.norm.weight", torch.zeros(16)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_model(weights(), out, like=base, extra_files=_PLAN)
    _assert_whole(out, base)


def _assert_whole(out, base):
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    found = load_file(out / "model.safetensors")
    assert found.keys() == base.headers.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.weights().items())


def test_a_disk_that_fills_while_writing_leaves_the_former_model_whole(opened, tmp_path):
    """A limit on the size of files makes writing fail where a full disk would."""
    base, out = opened("llama"), tmp_path / "out"
    save_model([], out, like=base, extra_files=_PLAN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (base.size_bytes // 2, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"out: cannot be written: .*kB needed, .* free\)"
        ):
            save_model([], out, like=base, extra_files=_PLAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _assert_whole(out, base)


def test_a_model_that_cannot_fit_is_refused_before_writing(tmp_path, cache_dir, save):
    directory = Path(shutil.copytree(save("llama"), tmp_path / "base"))
    with (directory / "model-00001-of-00001.safetensors").open("wb") as file:
        size = 1 << 42
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        header = json.dumps({"large": entry}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("no sparse files of this size here")
    (directory / "model.safetensors").unlink()
    base = open_checkpoint(directory, cache_dir=cache_dir)
    with pytest.raises(
        CheckpointError, match=r"out: not enough disk space: 4398 GB needed, .* fr"
    ):
        save_model([], tmp_path / "out", like=base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_a_killed_process_left_is_put_right(opened, tmp_path):
    """Killed while writing, and killed between the two renames."""
    base, out = opened("llama"), tmp_path / "out"
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "model.safetensors").write_text("half")
    save_model([], out, like=base, extra_files=_PLAN)
    _assert_whole(out, base)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(CheckpointError, match="no such tensor"):
        save_model([("x", torch.ones(1))], out, like=base, extra_files=_PLAN)
    _assert_whole(out, base)


@pytest.mark.slow
def test_lm_eval_loads_what_was_saved(save, opened, tmp_path, cache_dir):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = Path(shutil.copytree(save("llama"), tmp_path / "base"))
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    expert = opened("llama", 1)
    base = open_checkpoint(directory, cache_dir=cache_dir)
    save_model(expert.weights().items(), tmp_path / "out", like=base, extra_files=_PLAN)
    model = HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32")
    request = Instance("loglikelihood", {}, arguments=("a b", " c"), idx=0)
    ((found, _),) = model.loglikelihood([request], disable_tqdm=True)
    resident = transformers.AutoModelForCausalLM.from_pretrained(expert.path).eval()
    with torch.no_grad():
        logits = resident(torch.tensor([[words["a"], words["b"]]])).logits[0, -1]
    assert found == pytest.approx(logits.log_softmax(-1)[words["c"]].item(), abs=1e-5)

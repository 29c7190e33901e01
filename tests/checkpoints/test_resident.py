import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import check_spread, load_resident, writable_views
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES


def load(checkpoint, dtype=torch.float32, **settings):
    return load_resident(checkpoint, dtype=dtype, device="cpu", **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_writing_all_views_is_loading_another_checkpoint(name, opened):
    base, expert = opened(name), opened(name, 1)
    auto_class = ARCHITECTURES[name].auto_class
    model = load(base, auto_class=auto_class)
    views = writable_views(model)
    assert views.keys() == expert.headers.keys()
    for key, tensor in expert.weights().items():
        assert views[key].shape == tensor.shape
        views[key].copy_(tensor)
    expected = load(expert, auto_class=auto_class).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_element_is_in_exactly_one_view(name, opened):
    model = load(opened(name), auto_class=ARCHITECTURES[name].auto_class)
    views = writable_views(model)
    for view in views.values():
        view.fill_(0)
    for view in views.values():
        view.add_(1)
    assert all(tensor.eq(1).all() for tensor in model.state_dict().values())


def test_a_model_made_without_a_checkpoint_has_views_too():
    model = ARCHITECTURES["mixtral"].make()
    with torch.no_grad():
        for view in writable_views(model).values():
            view.fill_(3)
    assert all(parameter.eq(3).all() for parameter in model.parameters())


def test_a_tied_weight_is_one_view(opened):
    views = writable_views(load(opened("llama_tied")))
    assert "model.embed_tokens.weight" in views
    assert "lm_head.weight" not in views


def test_the_resident_model_is_ready_to_be_evaluated(opened, capfd):
    model = load(opened("llama"), torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert capfd.readouterr() == ("", "")


def test_writing_does_not_reach_the_files(opened):
    checkpoint = opened("llama")
    before = {file: file.read_bytes() for file in set(checkpoint.files.values())}
    for view in writable_views(load(checkpoint)).values():
        view.zero_()
    assert all(file.read_bytes() == data for file, data in before.items())


def test_the_outputs_are_those_of_transformers(save, opened):
    tokens = torch.arange(6)[None]
    expected = transformers.AutoModelForCausalLM.from_pretrained(save("qwen3_moe"))(tokens).logits
    assert torch.equal(load(opened("qwen3_moe"))(tokens).logits, expected)


def test_a_missing_head_is_made_but_a_missing_layer_is_refused(tmp_path, cache_dir, capfd):
    model = ARCHITECTURES["bert"].make()
    model.bert.save_pretrained(tmp_path / "headless")
    headless = open_checkpoint(tmp_path / "headless", cache_dir=cache_dir)
    capfd.readouterr()
    loaded = load(headless, auto_class="AutoModelForSequenceClassification")
    assert loaded.classifier.out_features == 3
    assert capfd.readouterr() == ("", "")
    state = model.state_dict()
    del state["bert.encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    partial = open_checkpoint(tmp_path / "partial", cache_dir=cache_dir)
    with pytest.raises(CheckpointError, match=r"has no weights for 'bert\.encoder\.layer\.1\.out"):
        load(partial, auto_class="AutoModelForSequenceClassification")


def test_a_language_model_without_an_output_embedding_is_refused(tmp_path, cache_dir):
    ARCHITECTURES["llama"].make().model.save_pretrained(tmp_path)
    bare = open_checkpoint(tmp_path, cache_dir=cache_dir)
    with pytest.raises(CheckpointError, match=r"has no weights for 'lm_head\.weight' of LlamaFor"):
        load(bare)


@pytest.mark.parametrize("name", ["AutoModelForNothing", "utils", "set_seed"])
def test_an_unknown_class_is_refused(name, opened):
    with pytest.raises(CheckpointError, match=f"transformers has no class '{name}'"):
        load(opened("llama"), auto_class=name)


def test_a_model_of_another_kind_is_refused(opened):
    with pytest.raises(CheckpointError, match="is a vit model, which is no AutoModelForC"):
        load(opened("vit"))


def test_a_model_whose_weights_are_permuted_is_refused(opened):
    from transformers.core_model_loading import Interleave, WeightConverter

    model = load(opened("llama"))
    model._weight_conversions = [
        WeightConverter("q_proj.weight", "q_proj.weight", operations=[Interleave(dim=0)])
    ]
    with pytest.raises(
        CheckpointError, match=r"LlamaForCausalLM cannot be written in place: 'mod"
    ):
        writable_views(model)


def test_a_model_of_which_a_part_is_left_over_is_refused():
    model = ARCHITECTURES["llama"].make()
    check_spread("tiny", model, "cpu")
    model.lm_head.to("meta")
    with pytest.raises(CheckpointError, match=r"tiny: there is no room for it on the cpu devices"):
        check_spread("tiny", model, "cpu")
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' and 20 more tensors"):
        check_spread("tiny", model, "cuda:1")


LOADS = """
import json, sys, threading, torch
from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import load_resident

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def load(folder):
    return load_resident(open_checkpoint(folder), dtype=torch.bfloat16, device="cpu")

load(sys.argv[1])  # what is imported at first use is not of interest
peaks, done = [own_bytes()], threading.Event()

def watch():
    while not done.wait(0.001):
        peaks.append(own_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.set()
watcher.join()
peaks.append(own_bytes())
print(json.dumps([sum(p.nbytes for p in model.parameters()), max(peaks) - peaks[0]]))
"""


@pytest.mark.slow
def test_loading_makes_no_copy_of_the_model_in_host_memory(tmp_path, save):
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048}
    model = ARCHITECTURES["llama"].make(**sizes, num_hidden_layers=8).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    shards = sorted(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    found = subprocess.run(
        [sys.executable, "-c", LOADS, str(save("llama")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    n_bytes, grown = json.loads(found.stdout)
    assert n_bytes > 2 * shards[-1]
    assert grown < 1.3 * shards[-1]


def test_weights_that_float16_does_not_hold_are_refused_by_name(save, tmp_path, cache_dir):
    shutil.copytree(save("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model", cache_dir=cache_dir)
    load_resident(checkpoint, dtype=torch.bfloat16, device="cpu")
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.weight' is not finite in torch\.flo"
    ):
        load_resident(checkpoint, dtype=torch.float16, device="cpu")

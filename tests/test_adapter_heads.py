"""Adapters with a classification head each, whose class counts are not the base's."""

import json
import shutil

import peft
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)
from typer.testing import CliRunner

from searchmerge import assemble
from searchmerge.classifier import load_classifier
from searchmerge.cli import app
from searchmerge.config import RunConfig
from searchmerge.models import open_models
from searchmerge.plan import MergePlan
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.evaluators.classifiers import BERT, save_tokenizer, text_tasks, texts, write_study

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
COUNTS = {"first": 5, "second": 3}
NAMES = [f"topic {i}" for i in range(5)]
_DISTIL = {
    "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": BERT["vocab_size"],
    "max_position_embeddings": 24, "initializer_range": 0.5,
}  # fmt: skip
BASES = {
    "bert": (lambda: BertModel(BertConfig(**BERT)), "query"),
    "pretrained": (lambda: BertForPreTraining(BertConfig(**BERT)), "query"),
    "with_a_head": (
        lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=4)), "query"
    ),
    "distilbert": (lambda: DistilBertModel(DistilBertConfig(**_DISTIL)), "q_lin"),
    "roberta": (
        lambda: RobertaModel(RobertaConfig(**BERT | {"max_position_embeddings": 26})), "query"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make each base with its adapters once; return their folder and PEFT's own logits."""
    done = {}

    def make(kind):
        if kind not in done:
            root = tmp_path_factory.mktemp(kind)
            done[kind] = root, make_adapters(root, *BASES[kind])
        return done[kind]

    return make


def make_adapters(root, make, layer):
    torch.manual_seed(0)
    make().save_pretrained(root / "base")
    save_tokenizer(root / "base")
    expected = {}
    (root / "data").mkdir()
    for seed, (expert, count) in enumerate(COUNTS.items()):
        torch.manual_seed(seed + 1)
        model = peft.get_peft_model(
            load(root, count), peft.LoraConfig(r=2, target_modules=[layer], task_type="SEQ_CLS")
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.5)
        model.save_pretrained(root / expert)
        loaded = peft.PeftModel.from_pretrained(load(root, count), root / expert)
        expected[expert] = logits(loaded, root / "base")
        rows = [{"text": t, "label": i % count} for i, t in enumerate(texts())]
        file = root / "data" / f"{expert}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return expected


def load(root, count):
    return AutoModelForSequenceClassification.from_pretrained(
        root / "base", num_labels=count, ignore_mismatched_sizes=True
    )


@torch.no_grad()
def logits(model, tokenizer_dir):
    """Return the logits of each text, alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    each = (tokenizer(text, truncation=True, return_tensors="pt") for text in texts())
    return torch.cat([model.eval()(**inputs).logits for inputs in each])


def merge(root, out, expert, *options):
    """Merge one adapter by the command line."""
    plan = reference_plans(tuple(COUNTS))[f"expert {expert}"]
    plan.to_yaml(out.parent / "plan.yaml")
    experts = [f"--expert={name}={root / name}" for name in COUNTS]
    given = [str(out.parent / "plan.yaml"), f"--base={root / 'base'}", *experts, f"--out={out}"]
    done = CliRunner().invoke(app, ["merge", *given, *options])
    assert done.exit_code == 0, done.output


def settings(kind):
    return {"heads": [r"^classifier\."]} if kind == "with_a_head" else {}


@pytest.mark.parametrize("kind", BASES)
def test_each_adapter_is_scored_with_its_own_classes(kind, made):
    root, expected = made(kind)
    study = read_study(write_study(root, text_tasks(), classification=settings(kind)))
    models = open_models(study)
    worker = assemble.make_worker(study, models, RunConfig(engine="eager", device="cpu"))
    schedule = assemble.make_schedule(study, worker.tasks())
    for expert, count in COUNTS.items():
        plan = reference_plans(tuple(COUNTS))[f"expert {expert}"]
        blocks = schedule.blocks["pilot"][expert]
        [result] = list(worker.score(plan, [tuple(blocks)]))
        found = [value for scores in result.scores for value in scores.values]
        order = [example for block in blocks for example in block.examples]
        right = expected[expert].argmax(1) == torch.arange(len(texts())) % count
        assert found == right[order].float().tolist()
        assert expected[expert].shape[1] == count


@pytest.mark.parametrize("kind", BASES)
def test_a_merge_saves_as_many_classes_as_each_adapter_has(kind, made, tmp_path):
    root, expected = made(kind)
    options = [
        f"--set=classification.{key}={json.dumps(value)}" for key, value in settings(kind).items()
    ]
    for expert, count in COUNTS.items():
        out = tmp_path / expert
        merge(root, out, expert, *options)
        model = load_classifier(out, expert)
        assert model.config.id2label == {i: f"LABEL_{i}" for i in range(count)}
        torch.testing.assert_close(logits(model, out), expected[expert], atol=5e-5, rtol=0)


def test_the_names_of_classes_are_the_adapters_own_where_they_are_as_many(made, tmp_path):
    root, _ = made("bert")
    folder = tmp_path / "models"
    shutil.copytree(root, folder)
    labels = {str(i): name for i, name in enumerate(NAMES)}
    for expert in COUNTS:
        (folder / expert / "config.json").write_text(json.dumps({"id2label": labels}))
    merge(folder, tmp_path / "out", "first")
    named = {e: load_classifier(tmp_path / "out", e).config.id2label for e in COUNTS}
    assert named["first"] == dict(enumerate(NAMES))
    assert named["second"] == {i: f"LABEL_{i}" for i in range(3)}


def test_whole_classifiers_are_merged_on_a_pretrained_language_model(made, tmp_path):
    root, _ = made("pretrained")
    shutil.copytree(root / "base", tmp_path / "base")
    for expert, count in COUNTS.items():
        model = load(root, count)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path / expert)
    for expert in COUNTS:
        merge(tmp_path, tmp_path / "out", expert)
        trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / expert)
        found = logits(load_classifier(tmp_path / "out", expert), tmp_path / "base")
        torch.testing.assert_close(found, logits(trained, tmp_path / "base"), atol=5e-5, rtol=0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_saves_twice_with_a_head_count_once(bias, tmp_path):
    config = RobertaConfig(**BERT | {"max_position_embeddings": 26}, num_labels=3)
    base = RobertaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", bias=bias, init_lora_weights=False
    )
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "a")
    plan = MergePlan(method="linear", experts=("a",), values={"coefficient": ((1.0,),)})
    plan.to_yaml(tmp_path / "plan.yaml")
    arguments = ["--base", tmp_path / "base", "--expert", f"a={tmp_path / 'a'}"]
    arguments += ["--out", tmp_path / "out"]
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "plan.yaml"), *map(str, arguments)])
    assert done.exit_code == 0, done.output
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(2, 10)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)

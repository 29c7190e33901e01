"""Classifiers that share an encoder, scored as transformers itself scores each of them."""

import gzip
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner

from searchmerge import assemble
from searchmerge.classifier import SavedHead, head_files, load_classifier
from searchmerge.cli import app
from searchmerge.config import RunConfig
from searchmerge.errors import CheckpointError, EvaluationError, SpecError
from searchmerge.evaluators.classification import macro_f1
from searchmerge.execution.gradient import LossRequest
from searchmerge.fingerprint import fingerprint
from searchmerge.heads import saved_heads
from searchmerge.models import load_task_vectors, merged_here, open_models, save_merge
from searchmerge.plan import MergePlan
from searchmerge.run import run_study
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from searchmerge.watch import Watch, content_of
from tests.evaluators.classifiers import (
    CLASSES,
    NAMES,
    TOWER,
    image_tasks,
    make_clip_experts,
    make_experts,
    make_pooled_experts,
    text_tasks,
    texts,
    write_images,
    write_study,
    write_texts,
)

EAGER = RunConfig(engine="eager", device="cpu")


class Silent:
    """An observer that shows nothing and keeps the trials."""

    def __init__(self):
        self.trials = []

    def phase(self, title, total, done=0):
        pass

    def step(self, name, scores):
        pass

    def trial(self, record, *, is_best):
        self.trials.append(record)


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make each kind of experts and data once."""
    roots = {}
    for name, make, write, kind in (
        ("bert", make_experts, write_texts, "bert"),
        ("llama", make_experts, write_texts, "llama"),
        ("vit", make_experts, write_images, "vit"),
        ("sentence", make_pooled_experts, write_texts, "bert"),
        ("clip", make_pooled_experts, write_images, "clip"),
    ):
        roots[name] = tmp_path_factory.mktemp(name)
        make(roots[name], kind)
        write(roots[name])
    roots["clip-classifier"] = tmp_path_factory.mktemp("clip-classifier")
    make_clip_experts(roots["clip-classifier"])
    write_images(roots["clip-classifier"])
    return roots


@pytest.fixture
def write(made, tmp_path):
    """Write studies in a folder with links to models and data."""

    def write(kind, tasks, **changes):
        for place in made[kind].iterdir():
            if not (tmp_path / place.name).exists():
                (tmp_path / place.name).symlink_to(place)
        return write_study(tmp_path, tasks, **changes)

    return write


def make_worker(file):
    study = read_study(file)
    return assemble.make_worker(study, open_models(study), EAGER)


def scored(file, expert):
    """Score the expert itself, which task arithmetic with one coefficient of 1 gives."""
    study, worker = read_study(file), make_worker(file)
    plan = reference_plans(study.experts)[f"expert {expert}"]
    schedule = assemble.make_schedule(study, worker.tasks())
    blocks = schedule.blocks["pilot"][expert]
    [result] = list(worker.score(plan, [tuple(blocks)]))
    order = [example for block in blocks for example in block.examples]
    return order, result.scores


def score(file, expert):
    """Return the examples in their order, and what the expert itself scores on them."""
    order, blocks = scored(file, expert)
    return order, [value for scores in blocks for value in scores.values]


def text_labels(expert, n=24):
    return [i % CLASSES[expert] for i in range(n)]


def own_text_logits(folder, expert):
    """Return what transformers makes of each text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / expert).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / expert)
    with torch.no_grad():
        return [
            model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0]
            for text in texts()
        ]


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("expert", CLASSES)
def test_a_text_classifier_scores_as_in_transformers(write, tmp_path, expert, kind):
    file = write(kind, text_tasks(), classification={"batch_tokens": 64})
    order, values = score(file, expert)
    predicted = [int(logits.argmax()) for logits in own_text_logits(tmp_path, expert)]
    labels = text_labels(expert)
    assert values == [float(predicted[i] == labels[i]) for i in order]
    assert 0 < sum(values) < len(values)  # or this test would show little


def test_grades_are_the_lead_of_the_right_class_over_the_likeliest_other(write, tmp_path):
    expert = next(iter(CLASSES))
    file = write("bert", text_tasks(), classification={"batch_tokens": 64})
    order, blocks = scored(file, expert)
    labels, leads = text_labels(expert), {}
    for i, logits in enumerate(own_text_logits(tmp_path, expert)):
        others = [float(z) for k, z in enumerate(logits) if k != labels[i]]
        leads[i] = float(logits[labels[i]]) - max(others)
    grades = [grade for block in blocks for grade in block.grades]
    assert grades == pytest.approx([leads[i] for i in order], abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
def test_a_sentence_encoder_is_pooled_and_has_a_linear_head(write, tmp_path, pooling):
    file = write("sentence", text_tasks(), classification={"pooling": pooling})
    tasks = text_tasks(labels=["red", "green", "blue"])
    tasks["second"]["labels"] = None
    file = write("sentence", tasks, classification={"pooling": pooling})
    order, values = score(file, "first")
    head = load_file(tmp_path / "first" / "model.safetensors")
    model = AutoModel.from_pretrained(tmp_path / "first").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    expected = []
    for i in order:
        with torch.no_grad():
            out = model(**tokenizer(texts()[i], truncation=True, return_tensors="pt"))
        states = out.last_hidden_state[0]
        vector = {
            "mean": states.mean(0),
            "cls": states[0],
            "max": states.amax(0),
            "pooler": out.pooler_output[0],
        }[pooling]
        logits = head["classifier.weight"] @ vector + head["classifier.bias"]
        expected.append(float(int(logits.argmax()) == i % 3))
    assert values == expected


@pytest.mark.parametrize("kind", ["vit", "clip-classifier"])
def test_an_image_classifier_scores_as_in_transformers(write, tmp_path, kind):
    from datasets import load_dataset
    from transformers import AutoImageProcessor

    changes = {"exclude": TOWER} if kind == "clip-classifier" else {}
    order, values = score(write(kind, image_tasks(), **changes), "first")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "first").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "first")
    rows = load_dataset("imagefolder", data_dir=str(tmp_path / "data" / "first"))["test"]
    names = rows.features["label"].names
    expected = []
    for i in order:
        with torch.no_grad():
            logits = model(**processor(rows[i]["image"], return_tensors="pt")).logits[0]
        expected.append(float(NAMES["first"][int(logits.argmax())] == names[rows[i]["label"]]))
    assert values == expected
    assert 0 < sum(values) < len(values)


def test_macro_f1_is_made_of_the_records_of_all_examples_in_one_block(write, tmp_path):
    order, records = score(write("bert", text_tasks(metric="macro_f1")), "second")
    logits = own_text_logits(tmp_path, "second")
    predicted = np.array([int(logits[i].argmax()) for i in order])
    true = np.array([text_labels("second")[i] for i in order])
    info = make_worker(tmp_path / "study.yaml").tasks()["second"]
    assert info.kind.score(records) == pytest.approx(f1_by_hand(true, predicted))
    assert info.kind.block_size(len(order), 4) == len(order)


def f1_by_hand(true, predicted):
    scores = []
    for k in sorted({*true.tolist(), *predicted.tolist()}):
        both = float(((true == k) & (predicted == k)).sum())
        precision = both / max(1, (predicted == k).sum())
        recall = both / max(1, (true == k).sum())
        total = precision + recall
        scores.append(2 * precision * recall / total if total else 0.0)
    return float(np.mean(scores))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_of_the_classes_that_occur(pairs):
    true, predicted = np.array(pairs).T
    found = macro_f1([float(5 * t + p) for t, p in pairs], 5)
    assert found == pytest.approx(f1_by_hand(true, predicted))


@pytest.mark.parametrize(
    ("kind", "tasks", "data"),
    [
        ("bert", text_tasks(), {"select": "data/first.jsonl", "hold_out": "moved.jsonl"}),
        ("vit", image_tasks(), {"select": "data/first", "hold_out": "moved"}),
    ],
)
def test_each_part_may_be_classified_from_data_of_its_own(write, tmp_path, kind, tasks, data):
    def scored(study):
        """Return each example's score by the expert itself."""
        worker = assemble.make_worker(study, open_models(study), EAGER)
        schedule = assemble.make_schedule(study, worker.tasks())
        blocks = [b for part in ("pilot", "hold_out") for b in schedule.blocks[part]["first"]]
        [result] = worker.score(reference_plans(study.experts)["expert first"], [tuple(blocks)])
        values = [dict(zip(s.block.examples, s.values, strict=True)) for s in result.scores]
        by_example = {e: value for of_block in values for e, value in of_block.items()}
        return [by_example[e] for e in sorted(by_example)], worker.tasks()["first"]

    whole, _ = scored(read_study(write(kind, tasks)))
    expected = [*whole, *whole]
    if kind == "bert":
        lines = (tmp_path / "data" / "first.jsonl").read_text().splitlines()
        (tmp_path / "moved.jsonl").write_text("\n".join(reversed(lines)))
        expected = [*whole, *reversed(whole)]
    else:
        (tmp_path / "moved").symlink_to(tmp_path / "data" / "first")
    both = {**tasks["first"], "data": data, "select": None, "hold_out": None}
    study = read_study(write(kind, {**tasks, "first": both}))
    found, info = scored(study)
    assert found == expected and len(set(whole)) > 1
    assert [info.n_of(part) for part in data] == [len(whole)] * 2
    assert all(info.parts[part].source.endswith(data[part]) for part in data)
    files = fingerprint(study, content_of(open_models(study)), "cpu")["files"]
    assert set(data.values()) <= files.keys()


@pytest.mark.parametrize(
    ("kind", "tasks", "changes"),
    [
        ("bert", text_tasks(), {"objective": "normalised"}),
        ("bert", text_tasks(metric="macro_f1"), {"dtype": "bfloat16"}),
        ("vit", image_tasks(), {}),
        ("sentence", text_tasks(labels=None), {"classification": {"pooling": "mean"}}),
        ("clip", image_tasks(), {"classification": {"pooling": "pooler"}}),
        ("clip-classifier", image_tasks(), {"exclude": TOWER}),
    ],
    ids=["bert", "bert-f1-bf16", "vit", "sentence", "clip", "clip-classifier"],
)
def test_a_study_runs_to_a_merged_encoder(write, tmp_path, kind, tasks, changes):
    if kind == "sentence":
        tasks["first"] = {**tasks["first"], "labels": list(NAMES["first"])}
    study = read_study(write(kind, tasks, **changes))
    seen = Silent()
    results = run_study(study, EAGER, tmp_path / "run", seen)
    assert len(seen.trials) == 5
    assert all(record.value is not None for record in seen.trials)
    [winner] = [row for row in results.rows if row.name == results.winner]
    assert set(winner.hold_out) == set(CLASSES)
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    plan = MergePlan.from_yaml(tmp_path / "run" / "model" / "merge_plan.yaml")
    assert plan == results.merge_plan
    assert next(model.parameters()).isfinite().all()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "load_classifier(\"PATH OF THIS FOLDER\", 'first')" in card
    blocks = assemble.make_schedule(study, evaluated(study)).blocks["hold_out"]
    for expert, own in blocks.items():
        examples = [example for block in own for example in block.examples]
        classifier = load_classifier(tmp_path / "run" / "model", expert)
        labels = tuple(classifier.config.id2label[i] for i in range(CLASSES[expert]))
        numbered = tuple(f"LABEL_{i}" for i in range(CLASSES[expert]))
        assert labels == (numbered if kind == "clip" else NAMES.get(expert, numbered))
        predict = predicted_texts if "text" in tasks[expert] else predicted_images
        predicted, true = predict(tmp_path, classifier, expert, examples)
        if "metric" in tasks[expert]:
            assert winner.hold_out[expert] == pytest.approx(f1_by_hand(true, predicted))
        else:
            assert winner.hold_out[expert] == pytest.approx((true == predicted).mean())


def evaluated(study):
    evaluators = assemble.make_evaluators(study, open_models(study), "cpu")
    return {name: evaluator.tasks[name] for name, evaluator in evaluators.items()}


def predicted_texts(folder, classifier, expert, examples):
    """Return the classes that a saved classifier gives texts, and their own."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    with torch.no_grad():
        logits = [
            classifier(**tokenizer(texts()[i], truncation=True, return_tensors="pt")).logits[0]
            for i in examples
        ]
    true = [text_labels(expert)[i] for i in examples]
    return np.array([int(one.argmax()) for one in logits]), np.array(true)


def predicted_images(folder, classifier, expert, examples):
    """Return the classes that a saved classifier gives images, and their own."""
    from datasets import load_dataset
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder / "run" / "model")
    rows = load_dataset("imagefolder", data_dir=str(folder / "data" / expert))["test"]
    names = rows.features["label"].names
    own = classifier.config.id2label.values()
    order = list(own) if set(own) == set(names) else names
    predicted = []
    for i in examples:
        with torch.no_grad():
            logits = classifier(**processor(rows[i]["image"], return_tensors="pt")).logits
        predicted.append(int(logits[0].argmax()))
    return np.array(predicted), np.array([order.index(names[rows[i]["label"]]) for i in examples])


def test_heads_that_are_missing_are_written_by_the_next_run(write, tmp_path):
    study = read_study(write("bert", text_tasks()))
    for _ in range(2):
        run_study(study, EAGER, tmp_path / "run", Silent())
        saved = {f.name for f in (tmp_path / "run" / "model" / "heads").iterdir()}
        assert {"first.safetensors", "first.json"} <= saved
        shutil.rmtree(tmp_path / "run" / "model" / "heads")


def test_a_language_models_own_output_embedding_is_no_head(write, tmp_path):
    study = read_study(write("bert", text_tasks()))
    models = open_models(study)
    assert saved_heads(study, models).keys() == models.experts.keys()
    alone = replace(study, spec=study.spec.model_copy(update={"tasks": {}}))
    for architecture, n in (("BertForSequenceClassification", 2), ("LlamaForCausalLM", 0)):
        for checkpoint in models.experts.values():
            checkpoint.config["architectures"] = [architecture]
        assert len(saved_heads(alone, models)) == n


def test_a_saved_head_is_used_by_transformers_alone(write, tmp_path):
    study = read_study(write("bert", text_tasks()))
    models = open_models(study)
    plan = reference_plans(study.experts)["expert first"]
    heads = saved_heads(study, models)
    out = tmp_path / "out"
    files, check = head_files(heads, models.dtype), Watch(models).check
    save_merge(
        models,
        merged_here(models, load_task_vectors(study, models), plan),
        plan,
        out,
        files=files,
        check=check,
    )
    head = json.loads((out / "heads" / "first.json").read_text())
    names = {int(i): name for i, name in head["id2label"].items()}
    assert names == dict(enumerate(NAMES["first"]))
    model = AutoModelForSequenceClassification.from_pretrained(out, id2label=names).eval()
    model.load_state_dict(load_file(out / "heads" / "first.safetensors"), strict=False)
    inputs = AutoTokenizer.from_pretrained(out)(texts()[1], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert torch.allclose(logits, own_text_logits(tmp_path, "first")[1], atol=1e-5)
    assert torch.equal(logits, load_classifier(out, "first")(**inputs).logits[0])


def test_a_single_merge_saves_the_heads_too(write, tmp_path):
    write("bert", text_tasks())
    plan = reference_plans(tuple(CLASSES))["expert second"]
    plan.to_yaml(tmp_path / "plan.yaml")
    experts = [f"--expert={expert}={tmp_path / expert}" for expert in CLASSES]
    options = [f"--base={tmp_path / 'base'}", *experts, f"--out={tmp_path / 'out'}"]
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "plan.yaml"), *options])
    assert done.exit_code == 0, done.output
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(texts()[1], return_tensors="pt")
    logits = load_classifier(tmp_path / "out", "second")(**inputs).logits[0]
    assert torch.allclose(logits, own_text_logits(tmp_path, "second")[1], atol=1e-5)


def test_a_head_that_was_not_saved_is_refused(write, tmp_path):
    study = read_study(write("bert", text_tasks()))
    models = open_models(study)
    files = head_files(saved_heads(study, models))
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no head of an expert 'third' \(there are: none\)"):
        load_classifier(tmp_path / "out", "third")
    (tmp_path / "out" / "heads").mkdir()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no head of an expert 'third' .*first, second"):
        load_classifier(tmp_path / "out", "third")
    (tmp_path / "out" / "heads" / "first.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"first\.safetensors: cannot be read"):
        load_classifier(tmp_path / "out", "first")


def test_the_head_of_any_experts_name_has_a_file_in_the_folder():
    heads = {
        name: SavedHead({"score.weight": torch.ones(2, 3)}, None) for name in ("../a", "a/b", "ä")
    }
    places = [name.split("/") for name in head_files(heads)]
    assert all(len(place) == 2 and place[0] == "heads" for place in places)
    assert len({tuple(place) for place in places}) == 6


def test_the_same_weights_score_the_same_from_every_kind_of_file(write, tmp_path):
    file = write("bert", text_tasks())
    expected = score(file, "second")
    rows = [json.loads(line) for line in (tmp_path / "data/second.jsonl").read_text().splitlines()]
    folder = tmp_path / "other"
    folder.mkdir()
    with gzip.open(folder / "test.jsonl.gz", "wt") as packed:
        packed.write("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    (folder / "train.tsv").write_text("text\tlabel\n" + lines)
    (folder / "plain.csv").write_text("text,label\n" + lines.replace("\t", ","))
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(folder / "packed.parquet")
    for split in ("test", "train", "plain", "packed"):
        tasks = text_tasks()
        tasks["second"] |= {"data": "other", "split": split}
        assert score(write("bert", tasks), "second") == expected


def changed(**second):
    tasks = text_tasks()
    tasks["second"] |= second
    return tasks


def test_a_task_has_the_expert_of_its_name(write):
    named = score(write("bert", text_tasks()), "second")
    assert score(write("bert", changed(expert=None)), "second") == named


def test_a_task_of_another_name_has_to_name_its_expert(write):
    tasks = changed(expert=None)
    tasks["third"] = tasks.pop("second")
    match = "expert is missing: name the expert whose head classifies, or give the task its name"
    with pytest.raises(SpecError, match=match):
        score(write("bert", tasks), "third")


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        (
            changed(text="sentence"),
            r"tasks.second.text: no column 'sentence' \(there are: text, l",
        ),
        (changed(label="class"), "tasks.second.label: no column 'class'"),
        (changed(text="label"), "row 0 of column 'label' is 0, and no text"),
        (changed(data="data", split="third"), r"no split 'third' .*\(it has: first, second\)"),
        (changed(data="data"), r"split is missing \(it has: first, second\)"),
        (changed(data="./nowhere.jsonl"), "no file or folder ./nowhere.jsonl"),
        (changed(data="study.yaml"), "of no known format; known: .jsonl"),
        (changed(data="data/first.jsonl"), "row 0 has 'red' .*0 to 3; names: it does not say"),
        (changed(labels=["a", "b"]), "there are 2; its head has 4 classes"),
        (
            changed(expert="first", data="data/first.jsonl", labels=["red", "green", "green"]),
            "tasks.second.labels: 'green' stands twice in red, green, green",
        ),
        (changed(expert="first"), "row 3 has 3 in column 'label', .*names: red, green, blue"),
        (changed(image="picture"), "text, or image"),
        (changed(metric="f1"), "metric: .*'acc' or 'macro_f1'; found 'f1'"),
        (changed(num_fewshot=2), "num_fewshot belongs to evaluator lm_harness"),
    ],
)
def test_a_wrong_task_is_refused(write, tasks, match):
    with pytest.raises(SpecError, match=match):
        score(write("bert", tasks), "second")


def test_rows_without_a_label_come_last_and_are_never_scored(write, tmp_path):
    file = write("bert", text_tasks(), classification={"batch_tokens": 64})
    alone = own_text_logits(tmp_path, "second")
    data = tmp_path / "data/second.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    without = [{**row, "label": None} if i % 3 == 1 else row for i, row in enumerate(rows)]
    data = tmp_path / "partly.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in without))
    file = write("bert", changed(data="partly.jsonl"), classification={"batch_tokens": 64})
    worker = make_worker(file)
    info = worker.tasks()["second"]
    assert (info.n_examples, info.n_unlabelled, info.unlabelled) == (16, 8, range(16, 24))
    plan = reference_plans(read_study(file).experts)["expert second"]
    places = [i for i in range(24) if i % 3 != 1] + [i for i in range(24) if i % 3 == 1]
    request = LossRequest({"second": tuple((e,) for e in range(24))}, "entropy", gradient=False)
    [given] = worker.gradient(plan, request)
    own = [alone[place].softmax(0) for place in places]
    expected = [float(-(p * p.log()).sum()) for p in own]
    assert given.losses["second"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_task_without_any_label_is_refused_with_what_rows_without_one_are_for(write, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"text": "w1", "label": null}\n' * 4)
    message = r"second.label: no row of .*none.jsonl has a label .* loss: entropy"
    with pytest.raises(SpecError, match=message):
        score(write("bert", changed(data="none.jsonl")), "second")


def test_damaged_data_are_refused(write, tmp_path):
    tasks = changed(data="damaged.jsonl")
    (tmp_path / "damaged.jsonl").write_text('{"text": "w1", "label": 0}\n{"text": \n')
    with pytest.raises(SpecError, match=r"tasks.second.data: .*damaged.jsonl cannot be read"):
        score(write("bert", tasks), "second")


def test_a_base_without_tokenizer_files_is_refused(write, tmp_path):
    file = write("bert", text_tasks())
    base = (tmp_path / "base").resolve()
    (tmp_path / "base").unlink()
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SpecError, match="tokenizer has 5 tokens, all of them special; its files"):
        score(file, "second")


def test_an_expert_without_a_head_is_refused(write, tmp_path):
    file = write("bert", text_tasks())
    (tmp_path / "second").unlink()
    shutil.copytree(tmp_path / "base", tmp_path / "second")
    with pytest.raises(SpecError, match=r"experts.second .* has no tensor 'classifier\.\w+'"):
        score(file, "second")
    file = write("bert", text_tasks(), classification={"pooling": "mean"})
    with pytest.raises(SpecError, match=r"needs a linear .*\(its private tensors: none\)"):
        score(file, "second")


def test_a_decoder_that_names_no_padding_passes_over_what_fills_its_texts(write, tmp_path):
    file = write("llama", text_tasks(), classification={"batch_tokens": 64})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    named = score(file, "first")
    file.write_text(file.read_text().replace("base: base", "base: other"))
    assert score(file, "first") == named


def test_an_encoder_of_no_such_class_is_refused(write):
    file = write("vit", text_tasks(data="data/first/test"))
    with pytest.raises(CheckpointError, match="which is no AutoModelForSequenceClassification;"):
        score(file, "second")


def test_two_kinds_of_model_in_one_study_are_refused(write):
    tasks = text_tasks() | {"lm": {"split": "test"}}
    with pytest.raises(SpecError, match="one model cannot be AutoModelForSequenceClassification "):
        read_study(write("bert", tasks))


def test_logits_that_are_not_finite_name_task_and_example(write):
    study = read_study(write("bert", text_tasks()))
    models = open_models(study)
    evaluators = assemble.make_evaluators(study, models, "cpu")
    from searchmerge.checkpoints.resident import load_resident

    model = load_resident(
        models.base, dtype=torch.float32, device="cpu", auto_class=study.spec.resident_class
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[4 + 7] = float("nan")  # the token of w7
    with pytest.raises(EvaluationError, match=r"task 'first', example 1: .* not finite"):
        evaluators["first"].score(model, "first", [1, 2])


def test_a_trial_whose_logits_are_not_finite_fails_and_the_study_goes_on(write, tmp_path):
    space = {"method": "task_arithmetic", "coefficient": {"low": 0.0, "high": 10.0}}
    search = {"sampler": "random", "n_trials": 20, "round_blocks": 2}
    file = write("bert", text_tasks(), space=space, search=search)
    first = (tmp_path / "first").resolve()
    (tmp_path / "first").unlink()
    shutil.copytree(first, tmp_path / "first")
    weights = load_file(tmp_path / "first" / "model.safetensors")
    weights["bert.pooler.dense.weight"].fill_(5e37)  # infinite from a coefficient of 7 on
    save_file(weights, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
    study = read_study(file)
    seen = Silent()
    run_study(study, EAGER, tmp_path / "run", seen)
    failed = [record for record in seen.trials if record.value is None]
    assert any(record.value is not None for record in seen.trials[failed[0].number + 1 :])
    for record in failed:
        assert re.match(r"task '\w+', example \d+: .* logits that are not finite", record.failure)


def test_a_head_that_the_base_has_too_stays_each_experts_own(write, made, tmp_path):
    """The base is a classifier with as many classes; its head must not be merged."""
    file = write("bert", text_tasks())
    expected = score(file, "second")
    (tmp_path / "base").unlink()
    shutil.copytree(tmp_path / "first", tmp_path / "base")
    own = {"heads": ["^classifier"]}
    assert score(write("bert", text_tasks(), classification=own), "second") == expected


def test_an_image_classifier_may_be_the_base_of_others(write, tmp_path):
    """The heads of base and experts have the same names, and other shapes."""
    expected = score(write("clip-classifier", image_tasks(), exclude=TOWER), "second")
    (tmp_path / "base").unlink()
    shutil.copytree(tmp_path / "first", tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"own with `classification\.heads: \['\^classifier\\\.'\]`"
    ):
        score(write("clip-classifier", image_tasks()), "second")
    own = {"heads": ["^classifier"]}
    file = write("clip-classifier", image_tasks(), classification=own)
    assert score(file, "second") == expected
    study = read_study(file)
    run_study(study, EAGER, tmp_path / "run", Silent())
    names = load_classifier(tmp_path / "run" / "model", "second").config.id2label
    assert len(names) == CLASSES["second"]


@pytest.mark.parametrize("expert", CLASSES)
def test_the_loss_is_the_cross_entropy_and_has_a_gradient_by_coefficients(write, tmp_path, expert):
    file = write("bert", text_tasks(), classification={"batch_tokens": 64})
    own = torch.stack(own_text_logits(tmp_path, expert)[:8])
    study, worker = read_study(file), make_worker(file)
    plan = reference_plans(study.experts)[f"expert {expert}"]
    assert worker.tasks()[expert].losses == ("labels", "entropy", "agreement")

    def result(plan, **changes):
        request = LossRequest({expert: (tuple(range(8)),)}, **changes)
        [given] = worker.gradient(plan, request)
        return given

    labels = torch.tensor(text_labels(expert)[:8])
    expected = torch.nn.functional.cross_entropy(own, labels).item()
    assert result(plan).losses[expert] == pytest.approx([expected], rel=1e-4)
    entropy = -(own.softmax(1) * own.log_softmax(1)).sum(1).mean().item()
    assert result(plan, kind="entropy").losses[expert] == pytest.approx([entropy], rel=1e-4)
    teachers = {expert: plan}
    agreement = result(plan, kind="agreement", teachers=teachers).losses[expert]
    assert agreement == pytest.approx([0], abs=1e-5)
    for i in range(len(study.experts)):
        row = list(plan.values["coefficient"][0])
        ends = []
        for by in (0.002, -0.002):
            moved = replace(
                plan,
                values={"coefficient": (tuple(n + by * (j == i) for j, n in enumerate(row)),)},
            )
            ends += result(moved, gradient=False).losses[expert]
        slope = (ends[0] - ends[1]) / 0.004
        assert result(plan).rows[0][i] == pytest.approx(slope, rel=2e-2, abs=2e-3)

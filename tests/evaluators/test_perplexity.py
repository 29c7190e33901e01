"""Mean log-likelihoods of texts, against a model that reads every token's context by itself."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchmerge.config import RunConfig
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.perplexity import Perplexity, TextTask, text_windows
from searchmerge.evaluators.rows import DataSource
from searchmerge.evaluators.score_kind import Mean
from searchmerge.fingerprint import fingerprint
from searchmerge.models import open_models
from searchmerge.run import run_study
from searchmerge.study import read_study
from tests.evaluators.models import tiny_model, tiny_tokenizer
from tests.search.conftest import Recorder
from tests.tiny import make_models, make_study

TEXTS = ["the quick brown fox", "a", "dog fog " * 60, "the lazy dog is a kind of horse. " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = "".join(json.dumps({"body": text, "n": 3}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(rows)
    return folder


def evaluator(folder, text="body", **options):
    task = TextTask((DataSource(str(folder / "texts.jsonl")),), text)
    return Perplexity({"t": task}, model_dir=folder, **options)


def oracle(model, text, max_length, stride):
    """Score each token from the start of the window that predicts it, in float64."""
    model = model.double()
    ids = [0, *tiny_tokenizer().encode(text, add_special_tokens=False)]
    total, start = 0.0, 0
    for i in range(1, len(ids)):
        while i > start + max_length:
            end = min(len(ids), start + max_length + 1 + stride)
            start = end - 1 - max_length
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:i]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[i]])
    return total / (len(ids) - 1)


@pytest.mark.parametrize(
    "options", [{}, {"max_length": 16, "stride": 16}, {"max_length": 20, "stride": 3}]
)
def test_scores_are_mean_log_likelihoods(folder, options):
    found = evaluator(folder, **options).score(tiny_model("llama"), "t", range(4))
    sizes = {"max_length": 64, "stride": 32} | options
    expected = [oracle(tiny_model("llama"), text, **sizes) for text in TEXTS]
    assert found == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_what_else_is_scored(folder):
    own, model = evaluator(folder), tiny_model("llama")
    together = own.score(model, "t", [3, 0, 2])
    assert [own.score(model, "t", [i])[0] for i in (3, 0, 2)] == pytest.approx(together, abs=1e-5)
    assert own.tasks["t"].kind == Mean()
    assert own.tasks["t"].n_examples == 4


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_every_token_is_predicted_once_within_the_window(n, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    tokens = tuple(range(1, n + 1))
    windows = text_windows((0,), tokens, max_length, stride)
    assert sum((predicted for _, predicted in windows), ()) == tokens
    for k, (context, predicted) in enumerate(windows):
        whole = context + predicted
        assert whole == tuple(range(whole[0], whole[0] + len(whole)))
        assert len(whole) - 1 <= max_length
        assert k == 0 or len(context) >= max_length + 1 - stride


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"text": "text"}, r"tasks.t.text: no column 'text' \(there are: body, n\)"),
        ({"text": "n"}, "row 0 of column 'n' is 3, and no text"),
        ({"max_length": 8, "stride": 9}, "stride is 9; allowed are 1 to 8"),
    ],
)
def test_what_cannot_be_scored_is_refused(folder, options, match):
    with pytest.raises(SpecError, match=match):
        evaluator(folder, **options)


def test_a_text_without_tokens_is_refused(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"body": "a"}\n{"body": ""}\n')
    task = TextTask((DataSource(str(tmp_path / "empty.jsonl")),), "body")
    with pytest.raises(SpecError, match="row 1 is '', which has no tokens"):
        Perplexity({"t": task}, model_dir=folder)


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    task = TextTask((DataSource(str(folder / "texts.jsonl")),), "body")
    with pytest.raises(SpecError, match="the tokenizer cannot be loaded: ") as refused:
        Perplexity({"t": task}, model_dir=tmp_path)
    assert "\n" not in str(refused.value)


def test_a_collapsed_model_fails_by_task_and_example(folder):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"task 't', example 2: .* not a finite number"):
        evaluator(folder).score(model, "t", [2, 1])


def test_the_parts_of_a_task_may_be_files_of_their_own(folder):
    (folder / "more.txt").write_text("the lazy dog\na fog\n")
    more = DataSource(str(folder / "more.txt"))
    options = {"model_dir": folder, "max_length": 16}
    with pytest.raises(SpecError, match=r"tasks\.t\.text: no column 'body' \(there are: text\)"):
        Perplexity(
            {"t": TextTask((DataSource(str(folder / "texts.jsonl")), more), "body")}, **options
        )
    texts = folder / "texts.txt"
    texts.write_text("".join(f"{text.strip()}\n" for text in TEXTS))
    sources = (DataSource(str(texts)), more)
    apart = Perplexity({"t": TextTask(sources)}, **options)
    assert [apart.tasks["t"].n_of(part) for part in ("select", "hold_out")] == [4, 2]
    assert apart.tasks["t"].parts["hold_out"].source == str(folder / "more.txt")
    alone = [Perplexity({"t": TextTask((source,))}, **options) for source in sources]
    model = tiny_model("llama")
    expected = alone[0].score(model, "t", range(4)) + alone[1].score(model, "t", range(2))
    assert apart.score(model, "t", range(6)) == pytest.approx(expected, abs=1e-6)


def test_a_study_of_texts_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    make_models(tmp_path)
    texts = "".join(f"w{i} is a w{2 * i % 60}\n" for i in range(24))
    (tmp_path / "texts.txt").write_text(texts)
    task = {"evaluator": "perplexity", "data": "texts.txt", "expert": "first"}
    file = make_study(
        tmp_path,
        tasks={"texts": task},
        objective="normalised",
        search={"sampler": "random", "n_trials": 5},
        perplexity={"max_length": 16},
    )
    study = read_study(file)
    seen = Recorder()
    config = RunConfig(engine="eager", device="cpu")
    results = run_study(study, config, tmp_path / "run", seen)
    assert all(row.select["texts"] < 0 for row in results.rows)
    assert len(seen.trials) == 5
    changed = read_study(file, {"perplexity.max_length": "12"})
    models = open_models(study)
    one, other = (fingerprint(s, models, "cpu") for s in (study, changed))
    assert one != other


def test_the_loss_is_the_negative_score_and_can_be_differentiated(folder):
    model = tiny_model("llama")
    texts = evaluator(folder, max_length=16)
    assert texts.tasks["t"].losses == ("labels", "entropy", "agreement")
    loss = texts.loss(model, "t", range(4))
    scores = texts.score(model, "t", range(4))
    assert loss.tolist() == pytest.approx([-score for score in scores], rel=1e-4)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("max_length", [16, 64])
def test_what_comes_next_is_told_at_every_token_of_a_text(folder, max_length):
    model = tiny_model("llama")
    texts = evaluator(folder, max_length=max_length)
    given = texts.log_probabilities(model, "t", [3, 0])
    likelihoods = texts.loss(model, "t", [3, 0])
    for of_text, loss, example in zip(given, likelihoods, [3, 0], strict=True):
        tokens = tiny_tokenizer().encode(TEXTS[example], add_special_tokens=False)
        assert of_text.shape == (len(tokens), model.config.vocab_size)
        torch.testing.assert_close(of_text.exp().sum(1), torch.ones(len(tokens)))
        chosen = of_text[range(len(tokens)), tokens]
        torch.testing.assert_close(-chosen.mean(), loss, rtol=1e-4, atol=1e-4)

"""The resident model answers lm-eval as lm-eval's own model of the same weights does."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.language_model import make_lm
from tests.evaluators.lm_harness.tasks import TASKS, harness, instances, lm_eval_samples
from tests.evaluators.models import tiny_model, tiny_tokenizer
from tests.tiny import make_models

SHOTS = "a fox is a kind of animal. a dog is a kind of animal. which word is a kind of"
ANIMALS = ("fox", "dog", "cat", "horse", "lazy dog")
ANSWERS = (" yes", " no", " maybe not", " yes")  # one of them twice
REQUESTS = [
    ("question: what is a fox? answer:", " a dog"),
    ("question: what is a fox? answer:", " a dog"),
    ("question: what is a fox? answer:", " a quick horse"),
    ("question: what is a fox? answer:", "."),
    ("question: what is a fox? answer: ", "a dog"),  # a trailing space
    ("question: what is a fox? answer:  ", " no"),
    ("question: what is a dog? answer:", " a fox"),
    ("", "the quick brown fox"),
    ("", "a"),
    ("", "<s>the dog"),  # begins with the prefix token
    ("<s>the quick", " brown"),
    ("lazy dog " * 30, "jumps over"),  # longer than the window
    *((f"{SHOTS} question: is it a {animal}? answer:", a) for animal in ANIMALS for a in ANSWERS),
    ("the", " fox jumps over the lazy dog" * 4),
]


@pytest.fixture(params=["llama", "gpt2", "qwen2", "bloom"])
def both(request):
    """Our language model and lm-eval's, around the same weights.

    With its cache of logits, HFLM 0.4.13 gives a wrong log-likelihood to a window whose tokens
    are those of another one that has more tokens to predict, as in a text that repeats itself.
    """
    model = tiny_model(request.param)
    theirs = HFLM(
        model, tokenizer=tiny_tokenizer(), batch_size=3, max_length=64, logits_cache=False
    )
    ours = make_lm(tiny_tokenizer(), TransformersBackend(96), max_length=64)
    ours.model = model
    return ours, theirs


def test_log_likelihoods_are_those_of_hflm(both):
    ours, theirs = both
    found = ours.loglikelihood(instances("loglikelihood", REQUESTS))
    expected = theirs.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_those_of_hflm(both):
    ours, theirs = both
    texts = ["the quick brown fox", "a", "", "the lazy dog is a kind of horse. " * 12]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(
        instances("loglikelihood_rolling", texts), disable_tqdm=True
    )
    windows = 1 + max(map(len, texts)) // 64
    assert found == pytest.approx(expected, abs=1e-4 * windows)  # HFLM adds in float32
    ours.model = ours.model.double()
    exact = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    assert found == pytest.approx(exact, abs=1e-4)


def test_generated_texts_are_those_of_hflm(both):
    ours, theirs = both
    greedy = {"until": ["the", "."], "max_gen_toks": 12}
    prompts = [
        ("question: what is a fox?", greedy),
        ("a", greedy),
        ("the lazy dog " * 30, greedy),
        ("the", {"until": "\n", "max_gen_toks": 5}),
        ("a word that rhymes", {"until": [], "max_gen_toks": 20, "do_sample": False}),
        ("maybe", {"until": ["no"], "max_gen_toks": 6, "num_beams": 2}),
    ]
    found = ours.generate_until(instances("generate_until", prompts))
    expected = theirs.generate_until(instances("generate_until", prompts), disable_tqdm=True)
    assert found == expected


def test_our_model_serves_lm_eval_itself(folder, model):
    ours = make_lm(tiny_tokenizer(), TransformersBackend(96))
    ours.model = model
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    assert lm_eval_samples(folder, ours, "mc")[1] == pytest.approx(
        lm_eval_samples(folder, theirs, "mc")[1], nan_ok=True
    )


def test_sampling_is_repeatable(folder, model):
    lm = make_lm(tiny_tokenizer(), TransformersBackend(96))
    lm.model = model
    arguments = TASKS["sampled"]["generation_kwargs"]
    requests = instances("generate_until", [("the dog", arguments), ("a fox", arguments)])
    before = torch.random.get_rng_state()
    assert lm.generate_until(requests) == lm.generate_until(requests)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tokenizer_without_a_chat_template_is_refused(folder):
    with pytest.raises(SpecError, match="no chat template"):
        harness(folder, LmTask("mc", "test"), chat_template=True)


def test_a_continuation_longer_than_the_window_is_refused(folder, model):
    evaluator = harness(folder, LmTask("mc", "test"), max_length=2)
    with pytest.raises(SpecError, match="tokens; allowed are 1 to 2"):
        evaluator.score(model, "mine", range(7))


@pytest.mark.parametrize("added", [True, False])
def test_the_token_that_begins_a_text_is_added_as_in_hflm(tmp_path, added):
    make_models(tmp_path)
    base = tmp_path / "base"
    theirs = HFLM(str(base), add_bos_token=added, device="cpu")
    ours = make_lm(base, TransformersBackend(96), add_bos_token=added)
    for text in ("w1 is a", "<s> w1 is a", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, False) == theirs.tok_encode(text, False)
    assert (ours.tok_encode("w1")[0] == ours.prefix_token_id) == added

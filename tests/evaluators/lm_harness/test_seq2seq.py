"""Encoder-decoders answer lm-eval as lm-eval's own model of the same weights does."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.generation import GenerationOptions
from searchmerge.evaluators.lm_harness.language_model import make_lm
from searchmerge.evaluators.lm_harness.seq2seq import Seq2SeqBackend
from tests.evaluators.lm_harness.tasks import instances
from tests.evaluators.lm_harness.test_language_model import REQUESTS
from tests.evaluators.models import tiny_model, tiny_tokenizer


def ending_tokenizer():
    """Return a tokenizer that ends every text with its end token, as those of T5 and BART do."""
    plain = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer().backend_tokenizer).from_str(
            tiny_tokenizer().backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return plain


@pytest.fixture(params=["t5", "bart"])
def both(request):
    """Our language model and lm-eval's, around the same weights.

    In batches HFLM pads prompts on the left, which moves BART's positions, and lets an answer be
    longer the longer the longest prompt is: alone, each prompt gets what is its.
    """
    model, tokenizer = tiny_model(request.param), ending_tokenizer()
    theirs = HFLM(model, tokenizer=tokenizer, backend="seq2seq", batch_size=1, max_length=60)
    ours = make_lm(tokenizer, Seq2SeqBackend(96), max_length=60)
    ours.model = model
    return ours, theirs


def test_log_likelihoods_are_those_of_hflm(both):
    ours, theirs = both
    found = ours.loglikelihood(instances("loglikelihood", REQUESTS))
    expected = theirs.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    values, theirs_are = ([value for value, _ in told] for told in (found, expected))
    assert values == pytest.approx(theirs_are, abs=1e-4, rel=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(value, 3) for value, _ in found}) > 10


def test_a_continuation_that_greedy_decoding_gives_is_told(both):
    ours, _ = both
    backend = Seq2SeqBackend(96)
    context = tuple(ours.tok_encode("the quick brown fox"))
    options = GenerationOptions((), 6, {})
    [said] = backend.generate(ours.model, ours.tokenizer, [context], options)
    pairs = [(context, tuple(said[:5])), (context, (*said[:4], (said[4] + 1) % 320))]
    assert [greedy for _, greedy in backend.score(ours.model, pairs, 60)] == [True, False]


def test_rolling_log_likelihoods_are_those_of_hflm(both):
    ours, theirs = both
    texts = ["the quick brown fox", "a", "the lazy dog is a kind of horse. " * 12]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(
        instances("loglikelihood_rolling", texts), disable_tqdm=True
    )
    assert found == pytest.approx(expected, abs=1e-3)


def test_generated_texts_are_those_of_hflm(both):
    ours, theirs = both
    greedy = {"until": ["the", "."], "max_gen_toks": 12}
    prompts = [
        ("question: what is a fox?", greedy),
        ("question: what is a dog?", greedy),
        ("a", greedy),
        ("", greedy),
        ("a quick fox and a lazy dog " * 5, {"until": ["no"], "max_gen_toks": 4}),
        ("the", {"until": "\n", "max_gen_toks": 5}),
        ("a word that rhymes", {"until": [], "max_gen_toks": 20, "do_sample": False}),
        ("maybe", {"until": ["no"], "max_gen_toks": 6, "num_beams": 2}),
        ("<s>the quick", {"until": [], "max_gen_toks": 6}),
    ]
    found = ours.generate_until(instances("generate_until", prompts))
    expected = theirs.generate_until(instances("generate_until", prompts), disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > 5


def test_an_answer_ends_where_the_decoders_positions_do():
    model, tokenizer = tiny_model("bart"), ending_tokenizer()
    prompt = tuple(ending_tokenizer().encode("a quick fox and a lazy dog " * 9))[-60:]
    [said] = Seq2SeqBackend(96).generate(model, tokenizer, [prompt], GenerationOptions((), 40, {}))
    assert len(said) == 63


def test_what_is_drawn_depends_on_the_prompt_and_its_seed_alone(both):
    ours, _ = both
    prompts = [(5, 9, 30, 1), (7, 1), (11, 12, 13, 1), (5, 9, 30, 1)]
    drawn = {"do_sample": True, "temperature": 1.0}

    def said(order):
        options = GenerationOptions((), 8, drawn, tuple(10 + i for i in order))
        asked = [prompts[i] for i in order]
        rows = Seq2SeqBackend(96).generate(ours.model, ours.tokenizer, asked, options)
        texts = [ours.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return dict(zip(order, texts, strict=True))

    expected = said([0, 1, 2, 3])
    assert expected[0] != expected[3]
    for order in ([3, 1, 0, 2], [2], [0, 3]):
        assert said(order) == {i: expected[i] for i in order}


def test_gradients_are_those_of_the_models_own_loss(both):
    ours, _ = both
    model, backend = ours.model.double(), Seq2SeqBackend(64)
    pairs = [((5, 9, 30, 1), (40, 41)), ((7, 1), (50, 51, 52)), ((5, 9, 30, 1), (44,))]
    found = backend.log_likelihoods(model, pairs, 60)
    found.sum().backward()
    name = "encoder.layers.0.fc1.weight" if hasattr(model, "model") else "encoder.block.1.layer.1"
    weight = next(p for n, p in model.named_parameters() if name in n)
    gradient, weight.grad = weight.grad.clone(), None
    for (context, tokens), value in zip(pairs, found, strict=True):
        labels = torch.tensor([tokens])
        loss = model(input_ids=torch.tensor([context]), labels=labels).loss * len(tokens)
        assert float(value.detach()) == pytest.approx(-float(loss.detach()), abs=1e-4)
        (-loss).backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-4)


def test_what_comes_next_is_what_the_models_own_logits_say(both):
    ours, _ = both
    model, backend = ours.model, Seq2SeqBackend(64)
    pairs = [((5, 9, 30, 1), (40, 41)), ((7, 1), (50, 51, 52)), ((5, 9, 30, 1), (44,))]
    given = backend.log_probabilities(model, pairs, 60)
    for (context, tokens), of_pair in zip(pairs, given, strict=True):
        labels = torch.tensor([tokens])
        logits = model(input_ids=torch.tensor([context]), labels=labels).logits[0]
        torch.testing.assert_close(of_pair, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_a_model_without_padding_is_refused_with_the_key_to_add(both):
    ours, _ = both
    ours.model.config.pad_token_id = None
    with pytest.raises(SpecError, match=r"config\.json has no pad_token_id, .*; add it$"):
        ours.loglikelihood(instances("loglikelihood", REQUESTS))

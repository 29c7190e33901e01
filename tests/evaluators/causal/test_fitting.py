"""What does not fit into memory is run in smaller batches."""

import pytest
import torch

from searchmerge.evaluators.causal.fitting import Fitting
from searchmerge.evaluators.causal.generation import GenerationOptions, Generator
from searchmerge.evaluators.causal.scoring import CausalScorer
from tests.evaluators.models import tiny_model, tiny_tokenizer


def test_work_is_done_anew_with_smaller_parts_until_it_fits(caplog):
    asked = []

    def work(part):
        asked.append(part)
        if part > 0.25:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    fitting = Fitting()
    assert fitting.run(work) == fitting.run(work) == "done"
    assert asked == [1.0, 0.5, 0.25, 0.25]
    assert [record.getMessage()[-23:] for record in caplog.records] == [
        "going on with 1/2 of it",
        "going on with 1/4 of it",
    ]


def test_where_nothing_fits_the_error_is_raised():
    def work(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Fitting().run(work)


@pytest.fixture
def narrow():
    """A model that runs out of memory where a pass has more tokens than this."""
    model, most, sizes = tiny_model("llama"), 64, []

    def refuse(module, arguments, options):
        tokens = options["input_ids"] if "input_ids" in options else arguments[0]
        sizes.append(tokens.numel())
        if tokens.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model, sizes


PAIRS = [((1, 2, 3 + i % 5, i), (7, 8 + i % 3)) for i in range(40)]


def test_a_scorer_that_runs_out_of_memory_gives_the_same_scores(narrow):
    model, sizes = narrow
    scorer = CausalScorer(256)
    found = scorer.score(model, PAIRS, 64)
    expected = CausalScorer(32).score(tiny_model("llama"), PAIRS, 64)
    assert max(sizes) > 64
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    sizes.clear()
    scorer.score(model, PAIRS, 64)
    assert max(sizes) <= 64


def test_a_generator_that_runs_out_of_memory_gives_the_same_tokens(narrow):
    model, sizes = narrow
    tokenizer = tiny_tokenizer()
    prompts = [(1, 2 + i % 5, 3 + i % 7) for i in range(30)]
    for arguments in ({}, {"renormalize_logits": True}):  # by our loop, and by transformers'
        options = GenerationOptions((), 4, arguments)
        expected = Generator(64).generate(tiny_model("llama"), tokenizer, prompts, options)
        sizes.clear()
        assert Generator(64).generate(model, tokenizer, prompts, options) == expected
        assert max(sizes) > 64

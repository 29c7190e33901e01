"""What surrounds vLLM: its engine is played by a model of transformers that was told the weights.

vLLM itself is not run here; the module's docstring says where it was.
"""

import math

import pytest
import torch
from lm_eval.api.instance import Instance

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.generation import GenerationOptions
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.language_model import make_lm
from searchmerge.evaluators.lm_harness.vllm import (
    VllmBackend,
    VllmServer,
    VllmSettings,
    likelihood,
    named_weights,
    sampling_arguments,
)
from searchmerge.execution.followed_merger import FollowedMerger
from searchmerge.models import open_models
from searchmerge.study import read_study
from tests.evaluators.models import tiny_model, tiny_tokenizer
from tests.tiny import make_models, make_study


class PlayedServer:
    """Holds weights of its own, and answers as vLLM does: prompt by prompt, greedily."""

    def __init__(self, settings, stale=()):
        self.model = tiny_model("llama")
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        self.settings, self.stale = settings, stale
        self.reloads = 0
        self.asked = []

    def reload(self, weights):
        self.reloads += 1
        own = self.model.state_dict()
        for name, tensor in weights:
            if name not in self.stale:
                own[name].copy_(tensor)

    @torch.no_grad()
    def prompt_logprobs(self, prompts):
        found = []
        for prompt in prompts:
            logprobs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            rows = []
            for token, row in zip(prompt[1:], logprobs[:-1], strict=True):
                best = int(row.argmax())
                rank = 1 + int((row > row[token]).sum())
                rows.append({best: (float(row[best]), 1), token: (float(row[token]), rank)})
            found.append([None, *rows])
        return found

    @torch.no_grad()
    def generate(self, prompts, arguments):
        self.asked.append(arguments)
        found = []
        for prompt, its in zip(prompts, arguments, strict=True):
            tokens = list(prompt)
            for _ in range(its["max_tokens"]):
                tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            found.append(tokens[len(prompt) :])
        return found


def backend(tmp_path, **played):
    servers = []

    def start(settings):
        servers.append(PlayedServer(settings, **played))
        return servers[-1]

    return VllmBackend(VllmSettings(tmp_path, torch.float32), start), servers


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def instances(kind, arguments):
    return [Instance(kind, {}, each, i, ("t", i, 1)) for i, each in enumerate(arguments)]


def test_its_answers_are_those_of_transformers(tmp_path):
    model = tiny_model("llama")
    engine, _ = backend(tmp_path)
    engine.follow(model, weights_of(model))
    theirs = make_lm(tiny_tokenizer(), engine, max_length=40)
    ours = make_lm(tiny_tokenizer(), TransformersBackend(96), max_length=38)
    theirs.model = ours.model = model
    assert theirs.max_length == ours.max_length
    pairs = [("the quick", " brown fox"), ("", "a"), ("lazy dog " * 30, "jumps"), ("a", " dog")]
    texts = [("the quick brown fox",), ("the lazy dog is a horse. " * 9,)]
    stop = {"until": ["the"], "max_gen_toks": 6}
    prompts = [("question: a fox?", stop), ("a", stop), ("lazy dog " * 30, stop)]
    found = theirs.loglikelihood(instances("loglikelihood", pairs))
    expected = ours.loglikelihood(instances("loglikelihood", pairs))
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for kind, asked in (("loglikelihood_rolling", texts), ("generate_until", prompts)):
        answers = [getattr(lm, kind)(instances(kind, asked)) for lm in (theirs, ours)]
        if kind == "generate_until":
            assert answers[0] == answers[1]
        else:
            assert answers[0] == pytest.approx(answers[1], abs=1e-3)


def test_an_answer_is_drawn_with_a_seed_of_its_own_whatever_is_asked_beside_it(tmp_path):
    model = tiny_model("llama")
    engine, servers = backend(tmp_path)
    engine.follow(model, weights_of(model))
    lm = make_lm(tiny_tokenizer(), engine, max_length=40)
    lm.model = model
    drawn = {"do_sample": True, "max_gen_toks": 2}
    fox, dog, plain = instances(
        "generate_until", [("a fox", drawn), ("a dog", drawn), ("a dog", {"max_gen_toks": 2})]
    )
    for requests in ([fox, dog, dog, plain], [dog, dog, fox, plain]):
        lm.generate_until(requests)
    together, greedy, turned, _ = servers[0].asked
    seeds = [its["seed"] for its in together]
    assert len(set(seeds)) == 3
    assert [its["seed"] for its in turned] == [*seeds[1:], seeds[0]]
    assert "seed" not in greedy[0]


class Scales:
    """A merger that multiplies the model's weights."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def apply(self, plan):
        for parameter in self.model.parameters():
            parameter.mul_(plan)


def test_every_merge_is_followed_by_one_engine(tmp_path):
    model = tiny_model("llama")
    engine, servers = backend(tmp_path)
    merger = FollowedMerger(Scales(model), model, weights_of(model), [engine])
    for plan in (1.0, 0.9, 1.1):
        merger.apply(plan)
    [server] = servers
    assert server.reloads == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(server.model.get_parameter(name), parameter)


def test_an_engine_that_keeps_old_weights_is_refused(tmp_path):
    model = tiny_model("llama")
    engine, _ = backend(tmp_path, stale=("lm_head.weight",))
    with pytest.raises(SpecError, match=r"vLLM does not score as .* nats a token apart"):
        engine.follow(model, weights_of(model))


def test_a_collapsed_candidate_fails_alone(tmp_path):
    model = tiny_model("llama")
    engine, _ = backend(tmp_path)
    engine.follow(model, weights_of(model))
    broken = {name: torch.full_like(p, math.nan) for name, p in weights_of(model).items()}
    with pytest.raises(EvaluationError, match="vLLM gives a log-likelihood of nan"):
        engine.follow(model, broken)
    engine.follow(model, weights_of(model))


def test_a_tied_output_embedding_is_sent_too():
    model = tiny_model("qwen2")
    weights = weights_of(model)
    assert "lm_head.weight" not in weights
    sent = dict(named_weights(model, weights))
    assert sent.keys() - weights.keys() == {"lm_head.weight"}
    assert torch.equal(sent["lm_head.weight"], model.get_input_embeddings().weight)
    untied = tiny_model("llama")
    assert dict(named_weights(untied, weights_of(untied))).keys() == weights_of(untied).keys()


def test_a_continuation_is_read_from_the_prompts_log_probabilities():
    logprobs = [None, {5: (-1.0, 1)}, {7: (-0.5, 1), 6: (-2.0, 2)}, {8: (-0.25, 1)}]
    assert likelihood(logprobs, (4, 5), (6, 8)) == (-2.25, False)
    assert likelihood(logprobs, (4, 5, 6), (8,)) == (-0.25, True)
    assert likelihood(logprobs, (4, 5), (9, 8)) == (-math.inf, False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.0, "num_beams": 1}, {"temperature": 0.0}),
        ({"do_sample": False, "top_p": 0.5}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
            {"temperature": 0.7, "top_p": 0.9},
        ),
        ({"repetition_penalty": 1.2}, {"temperature": 0.0, "repetition_penalty": 1.2}),
    ],
)
def test_arguments_of_generation_are_translated(arguments, expected):
    options = GenerationOptions(("\n", ""), 12, arguments)
    found = sampling_arguments(options)
    assert found == {"max_tokens": 12, "stop": ["\n"], **expected}


def test_what_vllm_does_not_do_alike_is_refused():
    options = GenerationOptions((), 4, {"num_beams": 4, "typical_p": 0.5})
    with pytest.raises(
        SpecError, match=r"does not take 'num_beams', 'typical_p' .*it takes: do_s"
    ):
        sampling_arguments(options)


def test_a_study_asks_for_the_engine_and_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    make_models(tmp_path)
    settings = {"include_path": "tasks", "engine": "vllm", "vllm_memory": 0.4}
    study = read_study(make_study(tmp_path, lm_harness=settings))
    models = open_models(study)
    worker = assemble.make_worker(study, models, RunConfig(engine="eager", device="cpu"))
    assert set(worker.tasks()) == {"first", "second"}
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(SpecError, match=r"pip install 'searchmerge\[vllm\]'"):
            VllmServer(VllmSettings(tmp_path, torch.float32))

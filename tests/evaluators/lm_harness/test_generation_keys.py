"""Arguments of generation that would fail or do nothing are refused before a model is run."""

from pathlib import Path

import lm_eval
import pytest
import yaml

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.generation_keys import check_generation, draws_answers
from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import harness

WRONG = [
    (
        {"temprature": 0.7},
        r"\.temprature: no such argument; did you mean 'temperature'\? \(there are: until, ",
    ),
    ({"trust_remote_code": True}, r"\.trust_remote_code: no such argument"),
    ({"max_length": 20}, r"\.max_length: no such argument"),
    ({"num_return_sequences": 2}, r"\.num_return_sequences: no such argument"),
    ({"max_gen_toks": "many"}, r"\.max_gen_toks: a whole number from 1 is needed; found 'many'"),
    ({"max_gen_toks": 0}, r"\.max_gen_toks: a whole number from 1 is needed; found 0"),
    ({"max_gen_toks": None}, r"\.max_gen_toks: a whole number from 1 is needed; found None"),
    ({"until": 5}, r"\.until: a text or a list of texts is needed; found 5"),
    ({"until": ["x", None]}, r"\.until: a text or a list of texts is needed; found \['x', None\]"),
    ({"do_sample": "yes"}, r"\.do_sample: true or false is needed; found 'yes'"),
    ({"temperature": "hot"}, r"\.temperature: a number from 0 is needed; found 'hot'"),
    ({"temperature": -1}, r"\.temperature: a number from 0 is needed; found -1"),
    ({"top_p": 7}, r"\.top_p: a number above 0, up to 1 is needed; found 7"),
    ({"num_beams": 0}, r"\.num_beams: a whole number from 1 is needed; found 0"),
    ({"num_beams": True}, r"\.num_beams: a whole number from 1 is needed; found True"),
    ({"repetition_penalty": float("nan")}, r"\.repetition_penalty: a number above 0 is needed"),
    ({"do_sample": True, "temperature": 0.0}, r": do_sample: true with temperature: 0, at which"),
    ({"max_new_tokens": 3}, r": max_gen_toks and max_new_tokens are the same argument.*\(8\)"),
]


@pytest.mark.parametrize(("asked", "message"), WRONG, ids=[repr(asked) for asked, _ in WRONG])
def test_what_would_fail_or_do_nothing_is_refused_by_its_key(folder, asked, message):
    with pytest.raises(SpecError, match=rf"^tasks\.mine\.generation{message}"):
        harness(folder, LmTask("generate", "test", generation=asked))


def test_a_temperature_that_the_task_takes_no_notice_of_is_refused():
    own = {"do_sample": False, "temperature": 0.7}
    message = r"^tasks\.t\.generation\.temperature: the task has do_sample: false, with which"
    with pytest.raises(SpecError, match=message):
        check_generation(own, {"temperature": 0.7}, "tasks.t")
    check_generation(own, {}, "tasks.t")  # as lm-eval's own tasks have it
    check_generation(own, {"temperature": 0.7, "do_sample": False}, "tasks.t")


@pytest.mark.parametrize(
    "asked",
    [
        {"max_gen_toks": 4, "until": ["x", ""], "repetition_penalty": 1.2},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": "never"},
        {"do_sample": True, "temperature": 0.8, "top_k": None, "top_p": 0.9, "min_p": 0.1},
        {"do_sample": True, "top_h": 0.9, "typical_p": 0.8, "eta_cutoff": 0.1},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 3, "renormalize_logits": True},
    ],
)
def test_what_is_allowed_is_understood_by_transformers(folder, model, asked):
    evaluator = harness(folder, LmTask("generate", "test", generation=asked))
    assert len(evaluator.score(model, "mine", range(7))) == 7


def test_the_tasks_that_lm_eval_brings_are_allowed():
    class Loader(yaml.SafeLoader):
        """Passes over functions."""

    Loader.add_multi_constructor("!", lambda *_: None)
    files = (Path(lm_eval.__file__).parent / "tasks").rglob("*yaml")
    texts = (file.read_text(encoding="utf-8") for file in files)
    configs = (yaml.load(text, Loader) for text in texts if "\ngeneration_kwargs:" in text)
    found = [config["generation_kwargs"] or {} for config in configs]
    assert len(found) > 300
    for arguments in found:
        check_generation(arguments, {}, "tasks.t")
    assert any(map(draws_answers, found))
    assert not all(map(draws_answers, found))

"""lm-eval tasks of a study, scored on the resident model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from searchmerge import assemble
from searchmerge.check import check_study
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.tuning import Way
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from searchmerge.execution.executor import InProcessExecutor
from searchmerge.models import open_models
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.evaluators.lm_harness.tasks import harness, with_template
from tests.evaluators.models import tiny_tokenizer
from tests.studies_of_tasks import write_tasks
from tests.tiny import make_models, make_study


def test_scores_do_not_depend_on_earlier_calls_or_other_examples(folder, model):
    evaluator = harness(folder, LmTask("fewshot", "test"))
    whole = evaluator.score(model, "mine", range(7))
    assert evaluator.score(model, "mine", [5, 0, 3]) == (whole[5], whole[0], whole[3])
    assert evaluator.score(model, "mine", range(7)) == whole
    assert harness(folder, LmTask("fewshot", "test")).score(model, "mine", [3]) == (whole[3],)


def test_chat_templates_make_turns_of_the_prompt(folder):
    tokenizer = tiny_tokenizer()
    chat = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    evaluator = harness(
        folder, LmTask("fewshot", "test"), with_template(tokenizer, chat), chat_template=True
    )
    prompt = evaluator.prompts("mine", 0)[0]
    assert prompt.startswith("[user]") and "[assistant]" in prompt


def test_evaluators_are_looked_up_without_the_packages_that_they_run():
    code = (
        "import sys; from searchmerge.evaluators.evaluator import EVALUATORS; "
        "print(EVALUATORS['lm_harness'].keys.__name__, "
        "*sorted({'lm_eval', 'vllm', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LmTask"]


def test_a_candidate_with_logits_that_are_not_finite_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    make_models(tmp_path)
    weights = load_file(tmp_path / "second" / "model.safetensors")
    weights["model.norm.weight"][0] = 1e38  # three times that is finite, and its logits are not
    save_file(weights, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    study = read_study(make_study(tmp_path))
    config = RunConfig(engine="eager", device="cpu")
    worker = assemble.make_worker(study, open_models(study), config)
    executor = InProcessExecutor(worker)
    rounds = assemble.make_schedule(study, worker.tasks()).rounds["pilot"][:1]
    good = reference_plans(study.experts)["task arithmetic"]
    broken = replace(good, values={"coefficient": ((0.4, 3.3),)})
    events = []
    for job, plan in enumerate((good, broken, good)):
        executor.submit(job, plan, rounds)
        while executor.n_free == 0:
            events.append(executor.next_event(1.0))
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Scored", "Finished", "Failed", "Scored", "Finished"]
    first = rounds[0][0]
    assert f"task '{first.task}', document {first.examples[0]} of " in events[2].reason
    assert "not finite" in events[2].reason
    assert events[0].result.scores == events[3].result.scores


def test_check_refuses_a_generation_longer_than_the_window(tmp_path):
    make_models(tmp_path)
    make_study(tmp_path)
    write_tasks(tmp_path)
    generation = {"max_gen_toks": 200}
    tasks = {"said": {"split": "validation", "generation": generation}}
    study = read_study(make_study(tmp_path, tasks=tasks))
    message = "generation.max_gen_toks: 200 tokens are to be generated; allowed are up to 63"
    with pytest.raises(SpecError, match=rf"tasks\.said: 'said': {message}"):
        list(check_study(study, RunConfig()))


def test_a_generation_longer_than_the_window_is_refused_before_there_is_a_model(folder, model):
    def make(n_tokens):
        return LmHarness(
            {"mine": LmTask("generate", "test", generation={"max_gen_toks": n_tokens})},
            tokenizer=tiny_tokenizer(),
            backend=TransformersBackend(1024),
            section=LmHarnessSection(include_path=(".",)),
            folder=folder,
            config=model.config,
        )

    make(63)
    message = r"generation\.max_gen_toks: 64 tokens are to be generated; allowed are up to 63"
    with pytest.raises(SpecError, match=rf"tasks\.mine: 'generate': {message}"):
        make(64)


class Timed(TransformersBackend):
    """Finds that one text a row is faster; notes whether passes may grow, and the ways used."""

    def __init__(self):
        super().__init__(1024)
        self.could_grow, self.used = [], []

    def tune(self, model, score, *, may_grow):
        score()
        self.could_grow.append(may_grow)
        return {Way(packs=False, growth=4): 0.5, Way(): 1.0}

    def use(self, way):
        self.used.append(way)
        super().use(way)


def test_a_task_is_measured_told_as_json_and_scored_so(folder, model):
    backend = Timed()
    evaluator = harness(folder, LmTask("mc", "test"), backend=backend)
    tuning = json.loads(json.dumps(evaluator.tune(model, "mine", range(4))))
    assert tuning == {
        "packs": False,
        "growth": 4,
        "tried": [
            {"packs": False, "growth": 4, "seconds": 0.5},
            {"packs": True, "growth": 1, "seconds": 1.0},
        ],
    }
    usual = evaluator.score(model, "mine", range(4))
    evaluator.use("mine", tuning)
    assert evaluator.score(model, "mine", range(4)) == usual
    evaluator.use("mine", {})
    evaluator.score(model, "mine", range(4))
    assert backend.used == [Way(), Way(packs=False, growth=4), Way()]


def test_passes_keep_to_the_tokens_that_the_study_says(folder, model):
    backend = Timed()
    for batch_tokens in (None, 64):
        evaluator = harness(
            folder, LmTask("mc", "test"), backend=backend, batch_tokens=batch_tokens
        )
        evaluator.tune(model, "mine", [0])
    assert backend.could_grow == [True, False]


def test_tasks_that_generate_and_machines_without_a_gpu_are_not_measured(folder, model):
    backend = Timed()
    generates = harness(folder, LmTask("generate", "test"), backend=backend)
    assert generates.tune(model, "mine", [0]) == {}
    assert backend.could_grow == []
    assert harness(folder, LmTask("mc", "test")).tune(model, "mine", [0]) == {}

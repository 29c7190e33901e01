"""Prompts are lm-eval's, made when they are first asked for."""

from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.requests import TaskRequests
from tests.evaluators.lm_harness.tasks import harness


def test_fewshot_examples_are_drawn_once_by_the_seed(folder):
    def prompts(seed):
        evaluator = harness(folder, LmTask("fewshot", "test"), fewshot_seed=seed)
        return [evaluator.prompts("mine", i)[0] for i in range(7)]

    assert prompts(1) == prompts(1) != prompts(2)
    assert all("of train" in prompt and "of test" in prompt for prompt in prompts(1))


def test_the_study_may_change_the_number_of_fewshot_examples(folder):
    evaluator = harness(folder, LmTask("fewshot", "test", num_fewshot=3))
    assert evaluator.prompts("mine", 0)[0].count("of train") == 3


class Prompted:
    """A task whose prompts say how many were made before them."""

    class config:
        task, repeats, fewshot_config = "mine", 1, None
        doc_to_text = doc_to_target = doc_to_choice = None

    def __init__(self, num_fewshot):
        self.config = type("config", (Prompted.config,), {"num_fewshot": num_fewshot})
        self.eval_docs, self.made = [f"doc {i}" for i in range(9)], []

    def set_fewshot_seed(self, seed):
        self.seed = seed

    def doc_to_prefix(self, doc):
        return None

    def fewshot_context(self, doc, num_fewshot, gen_prefix):
        self.made.append(doc)
        return f"{doc}, {len(self.made)} of {num_fewshot}"

    def construct_requests(self, doc, ctx, metadata, apply_chat_template, chat_template):
        return type("request", (), {"idx": 0, "args": (ctx,), "doc": doc})()


def prompts(requests, examples):
    return [request.args[0] for [request] in requests.of(examples)]


def test_prompts_without_examples_are_made_for_what_is_asked_alone_and_once():
    task = Prompted(num_fewshot=0)
    requests = TaskRequests("mine", task, [8, 4, 6], 7, {})
    assert task.seed == 7
    assert requests.prompted_with([6, 4]) == [4, 6]
    assert prompts(requests, [2]) == ["doc 6, 1 of 0"]
    assert prompts(requests, [0, 2]) == ["doc 8, 2 of 0", "doc 6, 1 of 0"]
    assert task.made == ["doc 6", "doc 8"]


def test_prompts_whose_examples_are_drawn_in_order_are_all_made_in_the_order_of_the_split():
    task = Prompted(num_fewshot=2)
    requests = TaskRequests("mine", task, [8, 4, 6], 7, {})
    assert requests.prompted_with([6]) == [4, 6, 8]
    assert prompts(requests, [2]) == ["doc 6, 2 of 2"]
    assert task.made == ["doc 4", "doc 6", "doc 8"]

"""Prompts as deployed: what lm-eval's own harness builds of the same keys."""

import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import harness, with_template
from tests.evaluators.models import tiny_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %} . {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if thinking %}[think]{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
)
TURNS = {"apply_chat_template": True, "fewshot_as_multiturn": True}
SYSTEM = {"system_instruction": "be the one"}
WAYS = {
    "a template": ({"chat_template": True}, TURNS),
    "a template, examples in one turn": (
        {"chat_template": True, "fewshot_as_multiturn": False},
        {"apply_chat_template": True},
    ),
    "a system's turn": ({"chat_template": True, **SYSTEM}, TURNS | SYSTEM),
    "a system instruction without turns": (SYSTEM, SYSTEM),
    "a prefix of the answer": (
        {"chat_template": True, "gen_prefix": "the answer is"},
        TURNS | {"gen_prefix": "the answer is"},
    ),
}


def theirs(folder, lm, task, **options):
    config = yaml.safe_load((folder / f"{task}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {k: str(folder / v) for k, v in files.items()}
    if gen_prefix := options.pop("gen_prefix", None):
        config["gen_prefix"] = gen_prefix
    loaded = TaskManager(include_defaults=False).load([config])["tasks"]
    loaded[task].set_fewshot_seed(1234)
    return evaluate(lm, {"tasks": loaded}, bootstrap_iters=0, **options)["samples"][task]


@pytest.mark.parametrize("template", [CHAT, STRICT], ids=["any turn", "no system's turn"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", ["mc", "fewshot", "generate"])
def test_prompts_and_scores_are_lm_evals_own(folder, model, task, way, template):
    keys, options = WAYS[way]
    tokenizer = with_template(tiny_tokenizer(), template)
    evaluator = harness(folder, LmTask(task, "test"), tokenizer, **keys)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    samples = theirs(folder, lm, task, **options)
    first = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == first]
    for sample in samples:
        prompts = [arguments[0] for arguments in sample["arguments"]]
        assert list(evaluator.prompts("mine", sample["doc_id"])) == prompts
    metric = evaluator.tasks["mine"].metric
    scores = evaluator.score(model, "mine", range(len(samples)))
    assert scores == pytest.approx(tuple(sample[metric] for sample in samples), abs=1e-6)


def test_a_tasks_own_keys_come_before_the_sections(folder):
    tokenizer = with_template(tiny_tokenizer(), CHAT)
    task = LmTask("mc", "test", chat_template=False, system_instruction="mine")
    evaluator = harness(folder, task, tokenizer, chat_template=True, system_instruction="all")
    prompt = evaluator.prompts("mine", 0)[0]
    assert "[user]" not in prompt and prompt.startswith("mine")


def test_a_template_takes_arguments_and_is_found_by_name(folder):
    templates = {"default": CHAT, "short": "{{ messages[0]['content'] }}!"}
    tokenizer = with_template(tiny_tokenizer(), templates)
    keys = {"chat_template": True, "template_arguments": {"thinking": True}}
    thinking = harness(folder, LmTask("mc", "test"), tokenizer, **keys)
    assert thinking.prompts("mine", 0)[0].endswith("[think]")
    short = harness(folder, LmTask("mc", "test"), tokenizer, chat_template="short")
    assert short.prompts("mine", 0)[0].endswith("!")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "long"}, r"tasks\.mine\.chat_template: .*named 'long' \(it has: def"),
        ({"fewshot_as_multiturn": True}, r"tasks\.mine\.fewshot_as_multiturn: needs a chat_temp"),
        ({"template_arguments": {"a": 1}}, r"tasks\.mine\.template_arguments: needs a chat_temp"),
        (
            {"chat_template": True, "template_arguments": {"thinking": True, "tokenize": True}},
            r"tasks\.mine\.template_arguments\.tokenize: is what prompts are made with; give wha",
        ),
    ],
)
def test_what_the_tokenizer_cannot_do_is_refused(folder, keys, message):
    with pytest.raises(SpecError, match=message):
        harness(folder, LmTask("mc", "test"), with_template(tiny_tokenizer(), CHAT), **keys)


def test_what_the_model_reads_is_shown_whole_and_an_unused_template_is_named(folder):
    tokenizer = with_template(tiny_tokenizer(), CHAT)
    plain = harness(folder, LmTask("mc", "test"), tokenizer)
    chat = harness(folder, LmTask("mc", "test"), tokenizer, chat_template=True)
    assert chat.shown("mine", 0).startswith("<s>") and "[assistant]" in chat.shown("mine", 0)
    assert chat.doubts("mine") == []
    assert "has a chat template, which is not used" in plain.doubts("mine")[0]
    assert harness(folder, LmTask("mc", "test")).doubts("mine") == []

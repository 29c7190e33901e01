"""Studies of every sort of lm-eval task on tiny models, run in this process."""

import yaml
from rich.console import Console

from searchmerge.config import RunConfig
from searchmerge.progress import ProgressView
from searchmerge.run import run_study
from searchmerge.study import read_study
from tests.tiny import make_study

CHAT = (
    "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}is {% endif %}"
)
SHOWN = {"fewshot_split": "validation", "num_fewshot": 2}


def write_tasks(root):
    """Give the tasks a group of both, one that draws few-shot examples, and one that generates."""
    tasks = root / "tasks"
    config = yaml.safe_load((tasks / "first.yaml").read_text())
    (tasks / "pair.yaml").write_text(
        yaml.safe_dump({"group": "pair", "task": ["tiny_first", "tiny_second"]})
    )
    files = config["dataset_kwargs"]["data_files"] | {"train": "second.jsonl"}
    drawn = config | {
        "task": "drawn",
        "dataset_kwargs": {"data_files": files},
        "fewshot_split": "train",
        "training_split": "train",
        "num_fewshot": 2,
    }
    answer = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    said = config | {
        "task": "said",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer][1]}}",
        "generation_kwargs": {"until": ["a"], "max_gen_toks": 3},
        "metric_list": [answer],
        "filter_list": [
            {"name": "all", "filter": [{"function": "take_first"}]},
            {
                "name": "word",
                "filter": [
                    {"function": "regex", "regex_pattern": "w([0-9])"},
                    {"function": "take_first"},
                ],
            },
        ],
    }
    del said["doc_to_choice"]
    for name, task in {
        "drawn": drawn,
        "said": said,
        "shown": config | {"task": "shown"} | SHOWN,
    }.items():
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task))


def run(root, **changes):
    file = make_study(root, **changes)
    write_tasks(root)
    study = read_study(file)
    run_dir = root / "runs" / study.name
    with ProgressView(Console(quiet=True)) as view:
        run_study(study, RunConfig(), run_dir, view)
    return run_dir

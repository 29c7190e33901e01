"""The card of a saved model: what it is, how it was made, what it scores."""

import shlex
from collections.abc import Mapping, Sequence

from searchmerge.checkpoints.hub import is_hub_id
from searchmerge.report.escape import code, code_block, markdown
from searchmerge.report.results import Results, markdown_table
from searchmerge.search.references import is_merge
from searchmerge.search.trials import REFINED
from searchmerge.wording import counted
from searchmerge.yaml_text import dump_yaml


def model_card(
    results: Results,
    base: str,
    experts: Mapping[str, str],
    classes: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str],
) -> str:
    """Return the README of a saved model, with the metadata that the hub reads.

    Args:
        results: Of the study that found the merge.
        base: The base model: a hub id, or where it is from the saved model's folder on.
        experts: Expert name to the same.
        classes: Expert name to the names of its head's classes, where it has a head of its own.
        overrides: What ``searchmerge merge`` has to be told beside plan and models.
    """
    hub_ids = [name for name in (base, *experts.values()) if is_hub_id(name)]
    relation = {"base_model_relation": "merge"} if is_merge(results.winner) else {}
    made_by = ["merge", "searchmerge", results.merge_plan.method]
    metadata = {
        **({"base_model": hub_ids, **relation} if hub_ids else {}),
        "library_name": "transformers",
        "tags": made_by if is_merge(results.winner) else ["searchmerge"],
    }
    models = "\n".join(f"- {markdown(name)}: {code(source)}" for name, source in experts.items())
    verdict = markdown(results.verdict)
    header, cells = results.table()
    table = markdown_table(header, cells)
    parts = [table, markdown(results.legend), results.drawn_from_text(), _heads_text(classes)]
    scores = "\n\n".join(part for part in parts if part)
    return f"""---
{dump_yaml(metadata, flow=False)}---

# {markdown(results.study)}

{_what(results, base)}:

{models}

{verdict}

{scores}

With `merge_plan.yaml` and these models this one is made again. Paths are from this folder on, in
which the command is run:

{code_block(_command(base, experts, overrides))}
"""


def _what(results: Results, base: str) -> str:
    """Return what the model is, up to the list of experts."""
    [winner] = [row for row in results.rows if row.name == results.winner]
    if not is_merge(winner.name):
        kept = "keeps the study's constraints and " if results.bounds else ""
        return (
            f"This is no merge but {markdown(winner.name)} as it is: no merge of these experts on "
            f"the base {code(base)} that searchmerge scored {kept}has better evidence"
        )
    merge = f"A merge of these experts on the base {code(base)}"
    if winner.is_candidate:
        n_groups = counted(len(results.merge_plan.groups), "group")
        is_refined = winner.name.startswith(f"{REFINED} ")
        how = f" and refined by gradient in {n_groups} of parameters" if is_refined else ""
        return f"{merge}, found by searchmerge{how}"
    return f"{merge} as published ({markdown(winner.name)}), chosen by searchmerge"


def _command(base: str, experts: Mapping[str, str], overrides: Mapping[str, str]) -> str:
    arguments = ["searchmerge", "merge", "merge_plan.yaml", "--base", base]
    for name, source in experts.items():
        arguments += ["--expert", f"{name}={source}"]
    for key, value in overrides.items():
        arguments += ["--set", f"{key}={value}"]
    return shlex.join([*arguments, "--out", "merged"])


def _heads_text(classes: Mapping[str, Sequence[str]]) -> str:
    """Return how the encoder becomes a classifier again, or nothing where no expert has a head."""
    if not classes:
        return ""
    cells = [[expert, ", ".join(names)] for expert, names in classes.items()]
    return f"""The model is the merged encoder. Every expert keeps a head of its own, in `heads/`:

{markdown_table(["head", "classes"], cells)}

```python
from searchmerge import load_classifier

model = load_classifier("PATH OF THIS FOLDER", {next(iter(classes))!r})
logits = model(**inputs).logits  # inputs: of this folder's tokenizer or image processor
label = model.config.id2label[int(logits[0].argmax())]
```"""

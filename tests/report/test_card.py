"""The card of a saved model: metadata of the hub, scores, and the command that makes it again."""

import shlex
from dataclasses import replace

import yaml

from searchmerge.report.card import model_card

EXPERTS = {"math": "someone/math", "code": "./my models/code"}


def parts(card):
    """Return the metadata and the text of a card."""
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_models_of_the_hub_are_named_in_the_metadata(make_results):
    metadata, text = parts(model_card(make_results(), "someone/base", EXPERTS, {}, {}))
    assert metadata == {
        "base_model": ["someone/base", "someone/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "searchmerge", "task_arithmetic"],
    }
    assert "- code: `./my models/code`" in text


def test_local_models_make_no_relation(make_results):
    experts = {"math": "../math", "code": "/data/x/code"}
    metadata, _ = parts(model_card(make_results(), "~/models/base", experts, {}, {}))
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata


def test_the_card_says_what_the_report_says(make_results):
    results = make_results()
    _, text = parts(model_card(results, "base", EXPERTS, {}, {}))
    assert text.lstrip().startswith("# toy")
    assert results.verdict in text
    for cells in results.table()[1]:
        assert f"| {' | '.join(cells)} |" in text
    assert "| +20.0 [+5.0, +35.0] |" in text
    assert results.legend in text


def test_the_card_says_that_a_winner_was_refined(make_results):
    results = make_results()
    [winner] = [row for row in results.rows if row.name == results.winner]
    _, text = parts(model_card(results, "base", EXPERTS, {}, {}))
    assert "found by searchmerge:" in text
    others = [row for row in results.rows if row is not winner]
    refined = replace(winner, name="refined TIES", is_candidate=True)
    results = replace(results, rows=[*others, refined], winner=refined.name)
    _, text = parts(model_card(results, "base", EXPERTS, {}, {}))
    n_groups = len(results.merge_plan.groups)
    assert f"found by searchmerge and refined by gradient in {n_groups} group" in text


def test_the_card_of_an_expert_alone_calls_it_no_merge(make_results, bounds):
    results = make_results()
    row = replace(results.rows[0], name="base", lead=())
    card = model_card(replace(results, rows=[row], winner="base"), "someone/base", EXPERTS, {}, {})
    metadata, text = parts(card)
    assert metadata == {
        "base_model": ["someone/base", "someone/math"],
        "library_name": "transformers",
        "tags": ["searchmerge"],
    }
    assert "This is no merge but base as it is: no merge of these experts" in text
    assert "searchmerge scored has better evidence" in text
    limited = replace(results, rows=[row], winner="base", bounds=bounds)
    card = model_card(limited, "someone/base", EXPERTS, {}, {})
    assert "scored keeps the study's constraints and has better evidence" in card


def test_the_card_says_whether_a_merge_was_found_or_published(make_results):
    _, found = parts(model_card(make_results(), "base", EXPERTS, {}, {}))
    assert "on the base `base`, found by searchmerge:" in found
    _, published = parts(model_card(make_results(winner="TIES"), "base", EXPERTS, {}, {}))
    assert "on the base `base` as published (TIES), chosen by searchmerge:" in published


def test_the_card_names_the_data_of_each_part(make_results, drawn_from):
    _, text = parts(model_card(make_results(drawn_from=drawn_from), "base", EXPERTS, {}, {}))
    assert "| math | split 'train' | split 'test' of m&lt;x&gt;.jsonl |\n\nWith `merge_p" in text
    assert "different data" not in model_card(make_results(), "base", EXPERTS, {}, {})


def test_the_command_takes_names_and_settings_as_a_shell_reads_them(make_results):
    overrides = {"exclude": "[norm, embed]", "dtype": "float32"}
    card = model_card(make_results(), "base model", EXPERTS, {}, overrides)
    [line] = [line for line in card.splitlines() if line.startswith("searchmerge merge")]
    assert shlex.split(line) == [
        "searchmerge", "merge", "merge_plan.yaml", "--base", "base model",
        "--expert", "math=someone/math", "--expert", "code=./my models/code",
        "--set", "exclude=[norm, embed]", "--set", "dtype=float32", "--out", "merged",
    ]  # fmt: skip


def test_heads_are_explained_where_there_are_some(make_results):
    assert "heads/" not in model_card(make_results(), "base", EXPERTS, {}, {})
    card = model_card(make_results(), "base", EXPERTS, {"math": ["no", "yes"]}, {})
    assert "| math | no, yes |" in card
    assert "load_classifier(\"PATH OF THIS FOLDER\", 'math')" in card

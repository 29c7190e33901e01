"""What the README says of models and adapters is what tests check, line by line."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"

CHECKED_BY = {
    "`model.safetensors`": [
        "checkpoints/test_weight_files.py::test_weights_in_every_form_are_those_that_were_saved",
        "checkpoints/test_weight_files.py::"
        "test_of_several_forms_that_is_read_which_transformers_loads",
        "checkpoints/test_torch_files.py::test_both_formats_are_read",
    ],
    "a pickle": [
        "checkpoints/test_torch_files.py::test_code_in_a_file_does_not_run",
        "checkpoints/test_weight_files.py::test_weights_that_transformers_would_not_load_are_refused",
        "checkpoints/test_weight_files.py::test_half_of_the_shards_without_their_index_are_refused",
    ],
    "other `rope_theta`": [
        "checkpoints/test_model_config.py::"
        "test_a_configuration_that_changes_a_forward_pass_is_refused_unless_accepted",
    ],
    "other cache": [
        "checkpoints/test_model_config.py::test_a_configuration_that_computes_the_same_fits"
    ],
    "an expert of a tied base": [
        "checkpoints/test_tying.py::"
        "test_an_adapter_that_unties_a_base_is_scored_and_saved_as_peft_runs_it",
        "checkpoints/test_tying.py::test_a_fine_tuned_model_that_stores_another_head_keeps_it",
        "checkpoints/test_tying.py::"
        "test_an_encoder_decoders_head_is_untied_without_its_other_embeddings",
    ],
    "tied experts": [
        "checkpoints/test_tying.py::"
        "test_a_base_with_a_head_of_its_own_takes_experts_that_tie_theirs"
    ],
    "LoRA, rsLoRA": [
        "checkpoints/test_lora.py::test_an_adapter_is_merged_exactly_as_peft_does",
        "checkpoints/test_lora.py::test_an_adapter_computes_what_it_does_in_peft",
        "checkpoints/test_lora_experts.py::"
        "test_factors_of_parameters_are_merged_exactly_as_peft_does",
    ],
    "`adapter_model.bin`": [
        "checkpoints/test_lora.py::test_an_adapter_in_pytorchs_format_is_the_same",
        "checkpoints/test_lora.py::test_the_adapter_in_a_folder_of_its_name_is_found",
    ],
    "LoftQ": [
        "checkpoints/test_lora.py::test_what_is_not_a_plain_lora_is_refused",
        "checkpoints/test_lora_config.py::test_what_is_not_a_plain_lora_or_is_garbage_is_refused",
        "checkpoints/test_lora.py::"
        "test_trained_tokens_of_an_output_with_a_bias_are_two_models_in_peft_and_refused",
    ],
    "an adapter that names another base": [
        "checkpoints/test_compatibility.py::test_an_adapter_of_another_base_is_doubted",
        "checkpoints/test_compatibility.py::test_equal_models_are_doubted",
    ],
    "classifiers, LoRA": [
        "test_adapter_heads.py::test_each_adapter_is_scored_with_its_own_classes",
        "test_adapter_heads.py::test_a_merge_saves_as_many_classes_as_each_adapter_has",
    ],
    "more layers": [
        "checkpoints/test_heads.py::test_more_of_the_model_itself_is_no_head",
        "checkpoints/test_heads.py::"
        "test_a_tensor_that_no_class_knows_is_refused_until_it_is_excluded",
    ],
    "`attn.bias`": [
        "checkpoints/test_heads.py::test_buffers_of_older_versions_are_in_nobodys_way",
        "checkpoints/test_heads.py::"
        "test_a_language_models_head_below_a_classifier_is_neither_needed_nor_merged",
        "checkpoints/test_heads.py::test_a_pooler_that_a_class_does_not_use_is_not_needed",
    ],
    "LayerNorm": [
        "checkpoints/test_heads.py::test_norms_are_merged_under_the_names_of_either_generation"
    ],
    "tokens that experts": [
        "checkpoints/test_vocabulary.py::test_tokens_that_an_expert_has_added_are_in_the_merged_model",
        "checkpoints/test_vocabulary.py::test_without_a_union_added_rows_are_refused_as_before",
    ],
    "a base without a chat template": [
        "checkpoints/test_vocabulary.py::"
        "test_the_merged_model_has_the_template_that_the_study_chooses",
        "checkpoints/test_vocabulary.py::"
        "test_templates_that_differ_are_remarked_upon_until_one_is_chosen",
    ],
    "sentence-transformers": [
        "checkpoints/test_companions.py::"
        "test_a_sentence_encoder_is_saved_with_its_modules_and_nothing_else"
    ],
    "multimodal": [
        "checkpoints/test_families.py::test_an_expert_of_the_same_family_is_merged_exactly",
        "checkpoints/test_families.py::test_a_text_expert_is_merged_into_a_multimodal_base",
        "checkpoints/test_families.py::"
        "test_a_multimodal_base_is_a_language_model_where_a_study_says_so",
    ],
    "T5, BART": [
        "evaluators/lm_harness/test_seq2seq.py::test_log_likelihoods_are_those_of_hflm",
        "test_verify.py::test_encoder_decoders_score_in_lm_eval_what_the_report_says",
    ],
    "BERT, BART": [
        "checkpoints/test_families.py::test_what_does_not_read_left_to_right_is_no_language_model"
    ],
    "code that comes": [
        "checkpoints/test_trust.py::test_nothing_of_a_checkpoint_runs_unless_the_study_says_so",
        "checkpoints/test_trust.py::test_a_model_with_code_of_its_own_is_merged_and_saved",
    ],
}
"""How a line of the table begins, and the tests that hold it."""


def lines():
    text = README.read_text(encoding="utf-8").split("### Which models and adapters")[1]
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    return [row.removeprefix("| ") for row in rows[1:]]


def test_every_line_of_the_table_is_checked_and_nothing_else():
    starts = [next((s for s in CHECKED_BY if line.startswith(s)), None) for line in lines()]
    assert starts == list(CHECKED_BY)


@pytest.mark.parametrize("name", [name for names in CHECKED_BY.values() for name in names])
def test_the_tests_that_check_it_are_there(name):
    file, function = name.split("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.compatibility import check_compatible
from searchmerge.checkpoints.model_config import comparable_config, differences, load_config
from searchmerge.errors import CheckpointError
from tests.checkpoints.published import PUBLISHED

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 16,
}
_MOE = {**_DECODER, "moe_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2}
_WINDOWS = {
    **_DECODER,
    "sliding_window": 3,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"] * 2,
}
_ENCODER = {
    key: _DECODER[key] for key in _DECODER if key not in ("num_key_value_heads", "head_dim")
}
_BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "eos_token_id": 13, "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
_DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}

_CHANGES = {
    "rope_theta": ("llama", _DECODER, {"rope_theta": 20.0}),
    "rope_scaling": ("llama", _DECODER, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "heads_of_equal_shapes": (
        "llama",
        _DECODER,
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "heads_of_an_encoder": ("bert", _ENCODER, {"num_attention_heads": 2}),
    "activation": ("llama", _DECODER, {"hidden_act": "gelu"}),
    "eps": ("llama", _DECODER, {"rms_norm_eps": 1e-2}),
    "window": ("mistral", {**_DECODER, "sliding_window": None}, {"sliding_window": 3}),
    "layer_types": ("qwen3", _WINDOWS, {"layer_types": ["sliding_attention", "full_attention"]}),
    "windows_used": (
        "qwen2",
        {**_DECODER, "sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": False},
    ),
    "experts_per_token": ("qwen3_moe", _MOE, {"num_experts_per_tok": 1}),
    "norm_of_routing": ("qwen3_moe", _MOE, {"norm_topk_prob": True}),
    "multiplier": ("granite", _DECODER, {"residual_multiplier": 0.5}),
    "softcap": ("gemma2", _DECODER, {"final_logit_softcapping": 0.1}),
    "scale_of_queries": ("gemma2", _DECODER, {"query_pre_attn_scalar": 1}),
    "norm_placement": (
        "opt",
        {**_ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16},
        {"do_layer_norm_before": False},
    ),
    "length_of_dynamic_angles": (
        "llama",
        {**_DECODER, **_DYNAMIC},
        {"max_position_embeddings": 4},
    ),
    "positions_from_padding": ("roberta", _ENCODER, {"pad_token_id": 0}),
}
"""Kind of model, its configuration, and what makes another model of the same tensors."""

_SAME = {
    "cache": ("llama", {"use_cache": False}),
    "dtype": ("llama", {"dtype": "bfloat16"}),
    "tokens": ("llama", {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6}),
    "length": ("llama", {"max_position_embeddings": 64}),
    "dropout": ("llama", {"attention_dropout": 0.1}),
    "initialisation": ("llama", {"initializer_range": 0.1}),
    "labels": ("llama", {"id2label": {"0": "a", "1": "b", "2": "c"}, "problem_type": None}),
    "what_other_programs_note": ("llama", {"unsloth_version": "2025.1", "_name_or_path": "x/y"}),
    "older_rope": ("llama", {"rope_theta": 10000, "rope_scaling": None, "rope_parameters": None}),
    "rope_in_full": ("llama", {"rope_parameters": {"rope_theta": 10000, "type": "default"}}),
    "head_dim_in_full": ("qwen2", {"head_dim": 4}),
    "windows_not_used": ("qwen2", {"sliding_window": 8, "max_window_layers": 1}),
    "float32_in_json": ("llama", {"rms_norm_eps": 9.999999974752427e-07}),
    "loss": ("qwen3_moe", {"router_aux_loss_coef": 0.5, "output_router_logits": True}),
}
"""Kind of model and what its configuration says otherwise, where it computes the same."""


@pytest.fixture
def pair(tmp_path):
    """Return a function that saves a model, and its weights under another configuration."""

    def pair(kind, config, changes):
        config = transformers.AutoConfig.for_model(kind, **config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _class_of(kind).from_config(config)
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.copy_(torch.randn_like(tensor) * 0.3)
        model.save_pretrained(tmp_path / "base")
        shutil.copytree(tmp_path / "base", tmp_path / "expert")
        file = tmp_path / "expert" / "config.json"
        said = json.loads(file.read_text())
        if "rope_theta" in changes:
            said.pop("rope_parameters")
        if changes.get("use_sliding_window") is False:
            said.pop("layer_types")
        file.write_text(json.dumps(said | changes))
        return tmp_path / "base", tmp_path / "expert"

    return pair


def _class_of(kind):
    masked = kind == "bert"
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


@torch.no_grad()
def _outputs(directory):
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    model = _class_of(kind).from_pretrained(directory, dtype=torch.float32).eval()
    return model(torch.arange(2, 14).unsqueeze(0)).logits


def _opened(directories):
    return [open_checkpoint(directory) for directory in directories]


@pytest.mark.parametrize("case", _CHANGES)
def test_a_configuration_that_changes_a_forward_pass_is_refused_unless_accepted(case, pair):
    kind, config, changes = _CHANGES[case]
    folders = pair(kind, config, changes)
    assert not torch.allclose(*map(_outputs, folders), atol=1e-3)
    base, expert = _opened(folders)
    with pytest.raises(CheckpointError, match=r"^expert 'a' \(.*expert\) has .* \(.*base\) has"):
        check_compatible(base, {"a": expert})
    found = differences(load_config(folders[0]), load_config(folders[1]))
    check_compatible(base, {"a": expert}, may_differ=list(found))
    check_compatible(base, {"a": expert}, may_differ=[name.partition(".")[0] for name in found])


@pytest.mark.parametrize("case", _SAME)
def test_a_configuration_that_computes_the_same_fits(case, pair):
    kind, changes = _SAME[case]
    folders = pair(kind, _MOE if "moe" in kind else _DECODER, changes)
    assert torch.equal(*map(_outputs, folders))
    base, expert = _opened(folders)
    check_compatible(base, {"a": expert})


_CLASSIFIERS = {
    "padding of a decoder": ("llama", _DECODER | {"pad_token_id": 0}, {"pad_token_id": 13}),
    "padding of an older decoder": (
        "gpt2",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        {"pad_token_id": 13},
    ),
    "end of an encoder-decoder": ("bart", _BART, {"eos_token_id": 12}),
    "start of an encoder-decoder": ("bart", _BART, {"decoder_start_token_id": 5}),
}
"""Classifiers of sequences, and which token they pool, or begin with."""


@pytest.mark.parametrize("case", _CLASSIFIERS)
def test_the_tokens_that_decide_what_a_classifier_pools_are_compared(case, tmp_path):
    kind, config, changes = _CLASSIFIERS[case]
    folders = tmp_path / "base", tmp_path / "expert"
    auto_class = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(transformers.AutoConfig.for_model(kind, **config))
        for tensor in model.parameters():
            tensor.data = torch.randn_like(tensor) * 0.3
    model.save_pretrained(folders[0])
    shutil.copytree(folders[0], folders[1])
    file = folders[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    tokens = torch.arange(2, 14).unsqueeze(0)
    with torch.no_grad():
        one, other = (
            auto_class.from_pretrained(folder).eval()(tokens).logits for folder in folders
        )
    assert not torch.allclose(one, other, atol=1e-3)
    base, expert = _opened(folders)
    [field] = changes
    with pytest.raises(CheckpointError, match=rf"^expert 'a' .* has {field} {changes[field]} in"):
        check_compatible(base, {"a": expert})
    check_compatible(base, {"a": expert}, may_differ=[field])
    check_compatible(base, {"a": expert}, auto_class="AutoModel")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_fine_tuned_models_configuration_as_it_is_published_fits(name, tmp_path):
    said, changes, dropped = PUBLISHED[name]
    tuned = {key: value for key, value in (said | changes).items() if key not in dropped}
    assert differences(*_read(tmp_path, said, tuned)) == {}
    heads = "num_heads" if name == "t5" else "num_attention_heads"
    other = tuned | {heads: said[heads] * 2}
    assert heads in differences(*_read(tmp_path, said, other))


def _read(tmp_path, *configs):
    """Return configurations as transformers reads them."""
    for i, config in enumerate(configs):
        (tmp_path / str(i)).mkdir(exist_ok=True)
        (tmp_path / str(i) / "config.json").write_text(json.dumps(config))
    return [comparable_config(config, tmp_path / str(i)) for i, config in enumerate(configs)]


def test_how_a_model_generates_is_compared_nowhere(tmp_path):
    said = {"model_type": "other", "num_beams": 4, "max_length": 20, "tokenizer_class": "A"}
    one, other = (
        comparable_config(said, tmp_path),
        comparable_config({"model_type": "o"}, tmp_path),
    )
    assert differences(one, other) == {}


def test_a_message_names_field_values_models_and_the_way_out(pair):
    base, expert = _opened(pair("llama", _DECODER, {"rope_theta": 5e5, "rms_norm_eps": 1e-5}))
    message = (
        r"^expert 'a' \(.*\) has rms_norm_eps 1e-05 in its config\.json; the base \(.*\) has "
        r"1e-06 \(also different: rope_parameters\.rope_theta\), and the merged model would run "
        r"with the base's; accept that with "
        r"`may_differ: \[rms_norm_eps, rope_parameters\.rope_theta\]`$"
    )
    with pytest.raises(CheckpointError, match=message):
        check_compatible(base, {"a": expert})
    with pytest.raises(CheckpointError, match=r"has rope_parameters\.rope_theta 500000\.0 "):
        check_compatible(base, {"a": expert}, may_differ=["rms_norm_eps"])


def test_what_is_accepted_must_differ(pair):
    base, expert = _opened(pair("llama", _DECODER, {}))
    with pytest.raises(CheckpointError, match=r"^may_differ: 'rope_theta' differs in no expert"):
        check_compatible(base, {"a": expert}, may_differ=["rope_theta"])


def test_models_within_a_model_are_compared():
    config = transformers.CONFIG_MAPPING["gemma3"].from_dict
    found = differences(config({"text_config": {"rope_theta": 7}}), config({}))
    assert found == {
        "text_config.rope_parameters.full_attention.rope_theta": (7, 1_000_000.0),
    }


def test_a_model_that_transformers_does_not_have_is_compared_as_its_file_says(tmp_path):
    one, other = (
        comparable_config({"model_type": "other", "hops": n, "use_cache": n}, tmp_path)
        for n in (1, 2)
    )
    assert isinstance(one, SimpleNamespace)
    assert differences(one, other) == {"hops": (1, 2)}


def test_a_value_that_transformers_refuses_is_named_in_one_line(pair):
    base, expert = _opened(pair("llama", _DECODER, {"hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match=r"expert: config\.json: .*hidden_size") as caught:
        check_compatible(base, {"a": expert})
    assert "\n" not in str(caught.value)

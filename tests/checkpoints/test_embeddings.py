"""Which tensors have a row per token, and which are one tensor under two names."""

import pytest

from searchmerge.checkpoints.embeddings import aliases, is_vocabulary, says_untied


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "shared.weight",
        "lm_head.weight",
        "embed_out.weight",
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
        "lm_head.bias",
    ],
)
def test_embeddings_of_tokens_are_known_by_their_names(name):
    assert is_vocabulary(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight",
        "transformer.wpe.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "vision.patch_embeddings.projection.weight",
        "cls.predictions.transform.dense.weight",
        "model.embed_tokens.weight.scale",
        "my_embed_tokens_2.weight",
    ],
)
def test_other_tensors_are_not_taken_for_embeddings(name):
    assert not is_vocabulary(name)


def test_an_output_embedding_is_another_name_of_the_input_embedding():
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert aliases(names, {}) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert aliases(names[:2], {}) == {}
    assert aliases(names[1:], {}) == {}


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}]
)
def test_where_the_configuration_says_untied_nothing_is(config):
    assert says_untied(config)
    assert aliases(["model.embed_tokens.weight", "lm_head.weight"], config) == {}


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"text_config": None}])
def test_where_it_does_not_say_so_embeddings_may_be_tied(config):
    assert not says_untied(config)


def test_both_halves_of_an_encoder_decoder_use_the_shared_embedding():
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight"]
    assert aliases([*names, "lm_head.weight"], {}) == {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }

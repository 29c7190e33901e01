"""Multimodal models and encoder-decoders as bases, and models that are no language models."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from searchmerge import assemble
from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import load_resident
from searchmerge.config import RunConfig
from searchmerge.errors import CheckpointError
from searchmerge.evaluators.causal.generation import GenerationOptions, Generator
from searchmerge.evaluators.causal.scoring import CausalScorer
from searchmerge.models import load_task_vectors, merged_here, open_models, save_merge
from searchmerge.plan import MergePlan
from searchmerge.spec import study_model
from searchmerge.study import Study, plain_study

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA = {**_TEXT, "head_dim": 8, "sliding_window": 4}
_QWEN = {**_TEXT, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_HALVES = {
    f"{half}_{key}": value
    for half in ("encoder", "decoder")
    for key, value in {"layers": 1, "ffn_dim": 24, "attention_heads": 2}.items()
}
CONFIGS = {
    "gemma3": {
        "text_config": _GEMMA,
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "gemma3_text": _GEMMA,
    "qwen2_vl": {
        "text_config": {
            **{key: value for key, value in _QWEN.items() if key != "rope_theta"},
            "rope_parameters": _MROPE,
            "max_position_embeddings": 64,
        },
        "vision_config": {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    },
    "qwen2": _QWEN,
    "t5": {
        "vocab_size": 64,
        "d_model": 16,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 8,
    },
    "bart": {"vocab_size": 64, "d_model": 16, **_HALVES},
    "bert": {
        key: _TEXT[key]
        for key in _TEXT
        if key.startswith(("num_h", "num_a", "vocab", "hid", "int"))
    },
}
_CLASSES = {
    "gemma3": "AutoModelForImageTextToText",
    "qwen2_vl": "AutoModelForImageTextToText",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
}
_TOKENS = torch.arange(2, 12).unsqueeze(0)


def _class_of(kind):
    return _CLASSES.get(kind, "AutoModelForCausalLM")


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a model of a kind, and gives its folder."""

    def save(kind: str, seed: int) -> Path:
        folder = tmp_path / f"{kind}{seed}"
        config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, _class_of(kind)).from_config(config)
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
        model.save_pretrained(folder)
        return folder

    return save


@torch.no_grad()
def _logits(model):
    halves = {"decoder_input_ids": _TOKENS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=_TOKENS.flip(1), **halves).logits


def _loaded(folder, kind):
    return getattr(transformers, _class_of(kind)).from_pretrained(folder, dtype=torch.float32)


def _merged(base, expert, out, **overrides):
    """Save the merge of one expert at coefficient 1."""
    study = plain_study(str(base), {"a": str(expert)}, overrides)
    models = open_models(study, resident=False)
    plan = MergePlan(method="linear", experts=("a",), values={"coefficient": ((1.0,),)})
    vectors = load_task_vectors(study, models)
    save_merge(models, merged_here(models, vectors, plan), plan, out, files={}, check=lambda: None)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "t5", "bart", "bert"])
def test_an_expert_of_the_same_family_is_merged_exactly(kind, save, tmp_path):
    expert = save(kind, 1)
    _merged(save(kind, 0), expert, tmp_path / "out")
    found, expected = (_loaded(folder, kind) for folder in (tmp_path / "out", expert))
    assert torch.allclose(_logits(found), _logits(expected), atol=1e-5)
    state = found.state_dict()
    assert all(torch.allclose(state[n], t, atol=1e-6) for n, t in expected.state_dict().items())


_PAIRS = {
    ("gemma3", "gemma3_text"): r"[^vision_tower, ^multi_modal_projector]",
    ("qwen2_vl", "qwen2"): "[^visual]",
}


@pytest.mark.parametrize(("whole", "text"), _PAIRS)
def test_a_text_expert_is_merged_into_a_multimodal_base(whole, text, save, tmp_path):
    base, expert = save(whole, 0), save(text, 1)
    with pytest.raises(CheckpointError, match=r"expert 'a' .* does not have '.*'.*`exclude: "):
        _merged(base, expert, tmp_path / "out")
    _merged(base, expert, tmp_path / "out", exclude=_PAIRS[whole, text])
    found = _loaded(tmp_path / "out", whole)
    assert torch.allclose(_logits(found), _logits(_loaded(expert, text)), atol=1e-5)
    seen = {name: t for name, t in _loaded(base, whole).state_dict().items() if "visual" in name}
    seen |= {n: t for n, t in _loaded(base, whole).state_dict().items() if "vision" in n}
    assert seen
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in seen.items())


@pytest.mark.parametrize(("whole", "text"), _PAIRS)
def test_a_multimodal_expert_is_merged_into_a_text_base(whole, text, save, tmp_path):
    base, expert = save(text, 0), save(whole, 1)
    _merged(base, expert, tmp_path / "out", exclude=_PAIRS[whole, text])
    found = _loaded(tmp_path / "out", text)
    assert torch.allclose(_logits(found), _logits(_loaded(expert, whole)), atol=1e-5)


def _study(base, expert, file=Path("study.yaml"), **changes):
    spec = study_model().model_validate(
        {
            "base": str(base),
            "experts": {"a": str(expert)},
            "space": {"method": "linear", "coefficient": {"low": 0, "high": 1}},
            "tasks": {"t": {"split": "test"}},
            "objective": "mean",
            **changes,
        }
    )
    return Study(spec, file)


def test_a_multimodal_base_is_a_language_model_where_a_study_says_so(save):
    base, expert = save("qwen2_vl", 0), save("qwen2_vl", 1)
    message = (
        r"qwen2_vl0: is a qwen2_vl model, which is no AutoModelForCausalLM; with `model_class:` "
        r"it can be loaded as AutoModel, AutoModelForImageTextToText$"
    )
    with pytest.raises(CheckpointError, match=message):
        open_models(_study(base, expert))
    study = _study(base, expert, model_class="AutoModelForImageTextToText")
    assert study.spec.resident_class == "AutoModelForImageTextToText"
    open_models(study)


@pytest.mark.parametrize(("kind", "why"), [
    ("bert", r"is a bert model, whose tokens see those that follow them; tasks of lm_harness and"),
    ("bart", r"is a bart model, an encoder-decoder, which is scored with its encoder by `mo"),
    ("t5", r"is a t5 model, an encoder-decoder, which is scored with its encoder by `mod"),
])  # fmt: skip
def test_what_does_not_read_left_to_right_is_no_language_model(kind, why, save):
    base, expert = save(kind, 0), save(kind, 1)
    for load in (
        lambda: open_models(_study(base, expert)),
        lambda: load_resident(open_checkpoint(base), dtype=torch.float32, device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=why) as caught:
            load()
        assert len(str(caught.value)) < 500


def test_an_encoder_decoder_is_scored_by_lm_eval_where_a_study_says_so(save):
    base, expert = save("t5", 0), save("t5", 1)
    asked = {"model_class": "AutoModelForSeq2SeqLM"}
    study = _study(base, expert, **asked)
    assert study.spec.resident_class == "AutoModelForSeq2SeqLM"
    open_models(study)
    message = (
        r"model_class is AutoModelForSeq2SeqLM; the tasks need a model that is loaded as Auto"
    )
    text = {"t": {"evaluator": "perplexity", "data": "text.txt"}}
    for other in ({"tasks": text}, {"lm_harness": {"engine": "vllm"}}):
        with pytest.raises(ValueError, match=message):
            _study(base, expert, **asked, **other)


def test_an_encoder_that_was_made_a_decoder_is_a_language_model(tmp_path):
    config = transformers.BertConfig(**CONFIGS["bert"], is_decoder=True)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    load_resident(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "t5", "bart"])
def test_a_worker_merges_into_the_resident_model_exactly(kind, save, tmp_path):
    base, expert = save(kind, 0), save(kind, 1)
    (tmp_path / f"logits_of_{kind}.py").write_text(
        "import torch\n"
        "from tests.checkpoints.test_families import _logits\n"
        "def score(model, task, examples):\n"
        f"    torch.save(_logits(model), {str(tmp_path / 'logits.pt')!r})\n"
        "    return [1.0] * len(examples)\n"
    )
    function = {"evaluator": "function", "function": f"logits_of_{kind}:score", "n_examples": 4}
    file = tmp_path / "study.yaml"
    study = _study(base, expert, file, tasks={"t": function}, model_class=_class_of(kind))
    config = RunConfig.model_validate({"device": "cpu", "engine": "eager"})
    worker = assemble.make_worker(study, open_models(study), config)
    schedule = assemble.make_schedule(study, worker.tasks())
    plan = MergePlan(method="linear", experts=("a",), values={"coefficient": ((1.0,),)})
    list(worker.score(plan, [tuple(schedule.blocks["pilot"]["t"])]))
    found = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(found, _logits(_loaded(expert, kind)), atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
@torch.no_grad()
def test_a_multimodal_model_scores_and_generates_text_as_it_does_by_itself(kind, save):
    checkpoint = open_checkpoint(save(kind, 0))
    model = load_resident(
        checkpoint, dtype=torch.float32, device="cpu", auto_class=_class_of(kind)
    )
    shared = tuple(range(3, 30))
    pairs = [((*shared, *range(40, 40 + n)), (50, 51, n)) for n in (2, 9, 5)]
    found = CausalScorer(128).score(model, pairs, 64)
    for (context, tokens), (score, _) in zip(pairs, found, strict=True):
        logits = model(input_ids=torch.tensor([context + tokens])).logits[0]
        likely = torch.log_softmax(logits, -1)
        expected = sum(float(likely[len(context) - 1 + i, t]) for i, t in enumerate(tokens))
        assert score == pytest.approx(expected, abs=1e-5)
    prompts = [context for context, _ in pairs]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, "w0")),
        eos_token="w1",
        pad_token="w0",
    )
    options = GenerationOptions((), 5, {})
    answers = Generator(128).generate(model, tokenizer, prompts, options)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for token in answer:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert token == int(logits.argmax())
            tokens.append(token)

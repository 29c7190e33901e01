"""Tokens that experts have added, and the tokenizer and the template of the merged model."""

import json

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from searchmerge import assemble
from searchmerge.checkpoints.checkpoint import open_checkpoint, tied
from searchmerge.checkpoints.chosen_tokenizer import chat_template
from searchmerge.checkpoints.compatibility import check_compatible
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.checkpoints.vocabulary import with_union
from searchmerge.checkpoints.writer import save_model
from searchmerge.config import RunConfig
from searchmerge.errors import CheckpointError, SpecError
from searchmerge.evaluators.tokenizer import load_tokenizer
from searchmerge.merging.merger import Merger
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.models import load_task_vectors, merged_here, open_models, save_merge
from searchmerge.plan import MergePlan
from searchmerge.spec import study_model
from searchmerge.study import Study, plain_study
from searchmerge.watch import content_of
from tests.checkpoints.conftest import ARCHITECTURES

_WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(20))]
_N_ROWS = 24  # two rows more than words, as models are padded
_TEMPLATE = "{% for message in messages %}<|im|>{{ message['content'] }}{% endfor %}"


def _tokenizer(added=(), words=_WORDS):
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<s>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    tokenizer.add_tokens([transformers.AddedToken(t, special=True) for t in added])
    return tokenizer


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a model whose tokenizer has tokens added."""

    def save(name, seed, added=(), *, n_rows=_N_ROWS, tied=False, template=None, words=_WORDS):
        config = transformers.LlamaConfig(
            vocab_size=n_rows,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.LlamaForCausalLM(config)
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.copy_(torch.randn_like(tensor) * 0.2)
        model.save_pretrained(tmp_path / name)
        tokenizer = _tokenizer(added, words)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def _merged(base, experts, out, plan=None, **said):
    overrides = {key: json.dumps(value) for key, value in said.items()}
    study = plain_study(str(base), {n: str(e) for n, e in experts.items()}, overrides)
    opened = open_models(study, resident=False)
    one = [1.0] + [0.0] * (len(experts) - 1)
    plan = plan or _plan(experts, one)
    save_merge(
        opened,
        merged_here(opened, load_task_vectors(study, opened), plan),
        plan,
        out,
        files={},
        check=lambda: None,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(out), load_tokenizer(out)


def _plan(experts, coefficients):
    values = {"coefficient": (tuple(coefficients),)}
    return MergePlan(method="task_arithmetic", experts=tuple(experts), values=values)


@torch.no_grad()
def _logits(model, tokens):
    return model.eval()(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_rows", [_N_ROWS, len(_WORDS) + 1, 32])
def test_tokens_that_an_expert_has_added_are_in_the_merged_model(tied, n_rows, save, tmp_path):
    """Whether it had rows to spare, had as many as it needs, or was padded."""
    base = save("base", 0, tied=tied)
    expert = save("chat", 1, ["<|im|>"], n_rows=n_rows, tied=tied)
    model, tokenizer = _merged(base, {"chat": expert}, tmp_path / "out", vocabulary="union")
    tokens = tokenizer("<|im|> w3 w4").input_ids
    assert tokens == [22, 5, 6]
    assert model.config.vocab_size == _N_ROWS
    expected = transformers.AutoModelForCausalLM.from_pretrained(expert)
    n_shared = min(n_rows, len(_WORDS) + 1)
    found = _logits(model, tokens)[:, :n_shared]
    torch.testing.assert_close(found, _logits(expected, tokens)[:, :n_shared], atol=3e-6, rtol=0)


def test_rows_of_added_tokens_are_merged_among_those_that_have_them(save, tmp_path):
    base = save("base", 0)
    experts = {
        "one": save("one", 1, ["<a>", "<b>"]),
        "two": save("two", 2, ["<b>", "<c>", "<d>"], n_rows=25),
        "three": save("three", 3),
    }
    plan = _plan(experts, [0.5, 0.25, 1.0])
    model, tokenizer = _merged(base, experts, tmp_path / "out", plan, vocabulary="union")
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>", "<d>"]) == [22, 23, 24, 25]
    assert model.config.vocab_size == 26

    def rows(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.detach()

    own = {name: rows(folder) for name, folder in {"base": base, **experts}.items()}
    found = model.lm_head.weight.detach()
    words = slice(0, len(_WORDS))
    vectors = {name: own[name][words] - own["base"][words] for name in experts}
    expected = own["base"][words] + 0.5 * vectors["one"] + 0.25 * vectors["two"]
    torch.testing.assert_close(found[words], expected + vectors["three"], atol=1e-6, rtol=0)
    assert torch.allclose(found[22], own["one"][22], atol=1e-6)  # <a>: whatever the coefficients
    assert torch.allclose(found[24], own["two"][23], atol=1e-6)  # <c>, another id than in `two`
    both = own["one"][23], own["two"][22]  # <b>
    mean = sum(both) / 2
    expected = mean + 0.5 * (both[0] - mean) + 0.25 * (both[1] - mean)
    assert torch.allclose(found[23], expected, atol=1e-6)


def test_the_resident_model_scores_with_the_added_tokens(save, tmp_path):
    base, expert = (
        save("base", 0, tied=True),
        save("chat", 1, ["<|im|>", "<|end|>", "<x>"], n_rows=25),
    )
    (tmp_path / "text.jsonl").write_text('{"text": "<|im|> w3 w4 <x>"}\n{"text": "w1 w2"}\n')
    spec = study_model().model_validate(
        {
            "base": str(base),
            "experts": {"chat": str(expert)},
            "vocabulary": "union",
            "space": {"method": "task_arithmetic", "coefficient": {"low": 0, "high": 1}},
            "tasks": {"t": {"evaluator": "perplexity", "data": str(tmp_path / "text.jsonl")}},
            "objective": "mean",
        }
    )
    study = Study(spec, tmp_path / "study.yaml")
    opened = open_models(study)
    config = RunConfig.model_validate({"device": "cpu", "engine": "eager"})
    worker = assemble.make_worker(study, opened, config)
    schedule = assemble.make_schedule(study, worker.tasks())
    (result,) = worker.score(_plan(["chat"], [1.0]), schedule.rounds["pilot"])
    (block,) = result.scores
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()
    ]
    tokenizer = load_tokenizer(expert)
    expected = []
    model = transformers.AutoModelForCausalLM.from_pretrained(expert)
    for example in block.block.examples:
        tokens = [0, *tokenizer.encode(texts[example], add_special_tokens=False)]
        likely = torch.log_softmax(_logits(model, tokens), -1)
        picked = [likely[i, token] for i, token in enumerate(tokens[1:])]
        expected.append(float(sum(picked)) / len(picked))
    assert block.values == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral", "t5"])
def test_every_architecture_takes_the_rows_that_an_expert_has_added(name, tmp_path):
    architecture = ARCHITECTURES[name]
    auto_class = getattr(transformers, architecture.auto_class)
    words = [*_WORDS, *(f"x{i}" for i in range(64 - len(_WORDS)))]
    for seed, folder, added in ((0, "base", []), (1, "expert", ["<a>", "<b>"])):
        model = architecture.make(seed)
        model.resize_token_embeddings(64 + len(added))
        model.save_pretrained(tmp_path / folder)
        _tokenizer(added, words).save_pretrained(tmp_path / folder)
    base, experts, added = with_union(
        open_checkpoint(tmp_path / "base"), {"a": open_checkpoint(tmp_path / "expert")}
    )
    assert [token.content for token in added] == ["<a>", "<b>"]
    check_compatible(base, experts, tokenizers="any")
    resident = load_resident(
        base, dtype=torch.float32, device="cpu", auto_class=architecture.auto_class
    )
    vectors = TaskVectors.from_weights(
        base.weights(), {"a": experts["a"].weights()}, tied=tied(base)
    )
    merger = Merger(vectors, targets=writable_views(resident), engine="eager")
    merger.apply(_plan(["a"], [1.0]))
    save_model(merger.merged(_plan(["a"], [1.0])), tmp_path / "out", like=base)

    def logits(model):
        tokens = torch.tensor([[3, 64, 5, 65, 7]])
        halves = {"decoder_input_ids": tokens} if name == "t5" else {}
        with torch.no_grad():
            return model.eval()(input_ids=tokens, **halves).logits

    expected = logits(auto_class.from_pretrained(tmp_path / "expert"))
    torch.testing.assert_close(logits(resident), expected, atol=3e-6, rtol=0)
    saved = logits(auto_class.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(saved, expected, atol=3e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_that_was_trained_with_added_tokens_is_exact(save, tmp_path):
    base = save("base", 0, n_rows=len(_WORDS))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(_WORDS) + 2)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
    )
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(tmp_path / "adapter")
    _tokenizer(["<a>", "<b>"]).save_pretrained(tmp_path / "adapter")
    merged, tokenizer = _merged(
        base, {"a": tmp_path / "adapter"}, tmp_path / "out", vocabulary="union"
    )
    tokens = tokenizer("w1 <a> w2 <b>").input_ids
    assert tokens == [3, 22, 4, 23]
    with torch.no_grad():
        expected = trained.eval()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(_logits(merged, tokens), expected, atol=3e-6, rtol=0)


def test_a_vocabulary_that_is_not_the_bases_with_tokens_added_is_refused(save, tmp_path):
    base = save("base", 0)
    other = save("other", 1, words=[*_WORDS[:-1], "new"])
    with pytest.raises(
        CheckpointError, match=r"the tokenizer of expert 'a' .* is not that of the"
    ):
        _merged(base, {"a": other}, tmp_path / "out", vocabulary="union")
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    _merged(base, {"a": other}, tmp_path / "out", vocabulary="union")  # as the base's
    wide = save("wide", 1, n_rows=30)
    (wide / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has 30 rows in .*, the base 24, and no tokenizer"):
        _merged(base, {"a": wide}, tmp_path / "out2", vocabulary="union")


def test_without_a_union_added_rows_are_refused_as_before(save, tmp_path):
    base, expert = save("base", 0), save("chat", 1, ["<|im|>"], n_rows=25)
    with pytest.raises(
        CheckpointError, match=r"`vocabulary: base`, or add its rows with `vocabul"
    ):
        _merged(base, {"chat": expert}, tmp_path / "out")


def test_the_merged_model_has_the_template_that_the_study_chooses(save, tmp_path):
    base = save("base", 0)
    experts = {"chat": save("chat", 1, template=_TEMPLATE), "plain": save("plain", 2)}
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }}")
    _, tokenizer = _merged(base, experts, tmp_path / "out")
    assert tokenizer.chat_template is None
    for choice, expected in (("chat", _TEMPLATE), (str(own), own.read_text()), ("base", None)):
        _, tokenizer = _merged(base, experts, tmp_path / "out", chat_template=choice)
        assert tokenizer.chat_template == chat_template(tmp_path / "out") == expected
    with pytest.raises(CheckpointError, match=r"chat_template: expert 'plain' \(.*\) has none"):
        _merged(base, experts, tmp_path / "out", chat_template="plain")
    with pytest.raises(CheckpointError, match=r"gone\.jinja: cannot be read: No such file"):
        _merged(base, experts, tmp_path / "out", chat_template=str(tmp_path / "gone.jinja"))
    own.write_text("a\n{% if %}")
    with pytest.raises(CheckpointError, match=r"own\.jinja:2: is no chat template: Expected an e"):
        _merged(base, experts, tmp_path / "out", chat_template=str(own))


def test_the_merged_model_has_the_tokenizer_of_an_expert_and_its_endings(save, tmp_path):
    base = save("base", 0)
    expert = save("chat", 1, ["<|im|>", "<|end|>"], template=_TEMPLATE)
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 23]}))
    (expert / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 23]}))
    said = {"tokenizer": "chat", "tokenizers": "any"}
    model, tokenizer = _merged(base, {"chat": expert}, tmp_path / "out", **said)
    assert tokenizer("<|end|>").input_ids == [23]
    assert tokenizer.chat_template == _TEMPLATE
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [1, 23]
    with pytest.raises(SpecError, match=r"tokenizer is 'other'; choose base or an expert: chat"):
        _merged(base, {"chat": expert}, tmp_path / "out", tokenizer="other")


def test_a_tokenizer_that_was_damaged_in_the_cache_is_made_again(save, tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    base, expert = save("base", 0), save("chat", 1, ["<|im|>"])
    for _ in range(2):
        _, tokenizer = _merged(base, {"chat": expert}, tmp_path / "out", vocabulary="union")
        assert tokenizer("<|im|>").input_ids == [22]
        (file,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
        file.write_text(file.read_text().replace("<|im|>", "<|xx|>"))


def test_another_template_in_the_same_file_is_another_study(save, tmp_path):
    base, expert, template = save("base", 0), save("chat", 1), tmp_path / "own.jinja"
    contents = []
    for text in ("a", "b"):
        template.write_text(text)
        study = plain_study(str(base), {"chat": str(expert)}, {"chat_template": str(template)})
        contents.append(content_of(open_models(study, resident=False)))
    assert contents[0] != contents[1]


def test_templates_that_differ_are_remarked_upon_until_one_is_chosen(save):
    base, expert = save("base", 0), save("chat", 1, template=_TEMPLATE)

    def doubts(**overrides):
        study = plain_study(str(base), {"chat": str(expert)}, overrides)
        return open_models(study, resident=False).doubts()

    (line,) = doubts()
    assert "expert 'chat'" in line
    assert "has a chat template, the merged model gets none; choose with `chat_template:`" in line
    assert doubts(chat_template="chat") == doubts(chat_template="base") == []

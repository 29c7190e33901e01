"""The benchmark of scoring runs, on a model that is too small to tell anything of speed."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import bench_scoring
from tests.evaluators.models import tiny_tokenizer

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
ROWS = ("bench_long", "bench_group", "bench_generate")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    config = LlamaConfig(**sizes, **heads, vocab_size=320, max_position_embeddings=16384)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.mark.slow
def test_rows_of_the_benchmark_agree_with_lm_eval(model_dir, monkeypatch, capsys):
    cases = {case.title: case for case in bench_scoring.CASES if case.task in ROWS}
    asked = ["--quick", "--model", str(model_dir), "--dtypes", "float32", "--cases", *ROWS]
    monkeypatch.setattr(sys, "argv", ["bench_scoring.py", *asked])
    bench_scoring.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if "float32 |" in line]
    assert [row[1] for row in rows] == list(cases)
    for _, title, *_, difference, same, _ in rows:
        n_same, n_examples = map(int, same.split("/"))
        assert n_same == n_examples == max(1, cases[title].n_examples // 4)
        assert float(difference or 0) < 1e-2

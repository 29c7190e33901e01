"""The benchmark of scoring runs, on a model that is too small to tell anything of speed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.evaluators.models import tiny_tokenizer

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
ROWS = {
    "bench_long": "4 choices, shared prefix of 2,000 tokens",
    "bench_group": "group of 3 tasks, chat template",
    "bench_generate": "generation",
}


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
def test_rows_of_the_benchmark_agree_with_lm_eval(model_dir):
    bench = Path(__file__).with_name("bench_scoring.py")  # it sets variables of its process
    asked = ["--quick", "--model", str(model_dir), "--dtypes", "float32", "--cases", *ROWS]
    done = subprocess.run(
        [sys.executable, str(bench), *asked], capture_output=True, text=True, check=True
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if "float32 |" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[1] for row in cells] == list(ROWS.values())
    for *_, difference, same, _ in cells:
        n_same, n_examples = same.split("/")
        assert n_same == n_examples
        assert float(difference or 0) < 1e-2

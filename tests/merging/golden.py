"""The outputs of the authors' own code, and how far a merger is from them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from searchmerge.merging.engine import EngineKind
from searchmerge.merging.merger import Merger
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan
from tests.merging.oracles import pcb_tied

CASES = sorted(path.parent for path in Path(__file__).parent.parent.glob("golden/*/manifest.json"))
CLOSENESS = 2e-6
"""Of two balances, relative: what float32 makes of equal ones may be as far apart."""

VARIANTS = {
    "pcb_root": "reference",
    "pcb_nlp": "nlp",
    "pcb_vis": "vision",
    "pcb_es": "vision_es",
}


class Case:
    """Base, experts and the authors' outputs, all float32, on one device."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        tensors = {k: v.to(device) for k, v in load_file(folder / "tensors.safetensors").items()}
        self.outputs = {k.removeprefix("out/"): v for k, v in tensors.items() if k[:4] == "out/"}
        self.base = self._weights(tensors, "base/")
        self.experts = {
            f"e{i}": self._weights(tensors, f"expert_{i}/")
            for i in range(self.manifest["n_tasks"])
        }

    @staticmethod
    def _weights(tensors, prefix):
        own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
        return {k.removeprefix(prefix): v.float() for k, v in own.items()}

    def flat(self, weights):
        return torch.cat([weights[e["name"]].reshape(-1) for e in self.manifest["flat_layout"]])

    def plan(self, key: str) -> MergePlan:
        """Return the plan that makes the output of this name."""
        experts = tuple(self.experts)
        parts = key.removeprefix("dropzero/").split("/")
        values, settings, method = {}, {}, parts[0]
        if method == "ties":
            settings = {"aggregate": parts[2]}
            values["density"] = ((float(parts[1][1:]),) * len(experts),)
            values["coefficient"] = ((float(parts[3][3:]),) * len(experts),)
        elif method in VARIANTS:
            method, settings = "pcb", {"variant": VARIANTS[parts[0]]}
            values["density"] = ((float(parts[1][1:]),) * len(experts),)
            values["coefficient"] = (tuple(self.manifest["lambda_vectors"][parts[2][3:]]),)
        elif method == "task_arithmetic":
            values["coefficient"] = ((float(parts[1][3:]),) * len(experts),)
        else:
            method, values["coefficient"] = "linear", ((1.0,) * len(experts),)
        return MergePlan(method, experts, values, settings=settings)

    def one_of_each(self) -> list[str]:
        """Return outputs such that each method, and each of its ways, made one."""
        first: dict[tuple[str, ...], str] = {}
        for key in self.outputs:
            method, *how = key.removeprefix("dropzero/").split("/")
            first.setdefault((method, how[1] if method == "ties" else ""), key)
        return list(first.values())

    def deviations(self, engine: EngineKind, keys: Sequence[str] | None = None) -> dict[str, int]:
        """Return, for every output that is not reproduced, how many of its entries are off.

        Args:
            engine: How arithmetic is run.
            keys: The outputs; ``None`` for all.
        """
        merger = Merger(TaskVectors.from_weights(self.base, self.experts), engine=engine)
        worst = {}
        for key in self.outputs if keys is None else keys:
            wanted = self.outputs[key]
            got = self.flat({**self.base, **dict(merger.merged(self.plan(key)))})
            bound = 1e-6 * wanted.abs() + 3e-7 * max(1.0, float(self._largest()))
            if "pcb" in key:
                bound = 3e-5 * wanted.abs() + 3e-6
            off = (got - wanted).abs() > bound
            if "pcb" in key and off.any():
                off &= ~self._tied(self.plan(key)).to(off.device)
            if off.any() or not torch.isfinite(got).all():
                worst[key] = int(off.sum())
        return worst

    def _tied(self, plan: MergePlan):
        """Return which entries of PCB are at its threshold, where one bit decides."""
        deltas = [self.flat(own) - self.flat(self.base) for own in self.experts.values()]
        active = [i for i, delta in enumerate(deltas) if delta.any()]
        stacked = np.stack([deltas[i].cpu().double().numpy() for i in active])
        densities = [plan.values["density"][0][i] for i in active]
        variant = str(plan.settings["variant"])
        return torch.from_numpy(pcb_tied(stacked, densities, variant, CLOSENESS))

    def _largest(self):
        return self.flat(self.base).abs().max()

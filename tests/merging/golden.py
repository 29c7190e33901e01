"""The outputs of the authors' own code, and how far a merger is from them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from searchmerge.merging.engine import EngineKind
from searchmerge.merging.merger import Merger
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan

CASES = sorted(path.parent for path in Path(__file__).parent.parent.glob("golden/*/manifest.json"))
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

    def deviations(self, engine: EngineKind) -> dict[str, int]:
        """Return, for every output that is not reproduced, how many of its entries are off."""
        merger = Merger(TaskVectors.from_weights(self.base, self.experts), engine=engine)
        worst = {}
        for key, wanted in self.outputs.items():
            got = self.flat({**self.base, **dict(merger.merged(self.plan(key)))})
            if "pcb" in key:
                bound, allowed = 3e-5 * wanted.abs() + 3e-6, max(2, len(wanted) // 1000)
            else:
                bound = 1e-6 * wanted.abs() + 3e-7 * max(1.0, float(self._largest()))
                allowed = 0
            n_off = int(((got - wanted).abs() > bound).sum())
            if n_off > allowed or not torch.isfinite(got).all():
                worst[key] = n_off
        return worst

    def _largest(self):
        return self.flat(self.base).abs().max()

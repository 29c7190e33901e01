"""Checkpoints that are opened, merged into a resident model, saved and loaded again."""

import torch
import transformers

from searchmerge.checkpoints.checkpoint import open_checkpoint, tied
from searchmerge.checkpoints.compatibility import check_compatible
from searchmerge.checkpoints.heads import exclude_patterns, unused_tensors
from searchmerge.checkpoints.renames import aligned
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.checkpoints.tying import untie_where_needed
from searchmerge.checkpoints.writer import save_model
from searchmerge.merging.merger import Merger
from searchmerge.merging.task_vectors import TaskVectors

_TOKENS = torch.arange(6)[None]
ATOL = 3e-6


def logits(model, name="llama_tied"):
    inputs = {"decoder_input_ids": _TOKENS} if name == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=_TOKENS, **inputs).logits


def opened_together(base, directories, cache_dir, auto_class):
    base = open_checkpoint(base, cache_dir=cache_dir)
    experts = {
        name: open_checkpoint(folder, base=base, cache_dir=cache_dir).named_as(base)
        for name, folder in directories.items()
    }
    base, experts = untie_where_needed(base, experts, auto_class)
    check_compatible(base, experts, auto_class=auto_class)
    return base, experts


class Merged:
    """Base and experts, merged into a resident model and saved."""

    def __init__(self, base, directories, cache_dir, auto_class="AutoModelForCausalLM"):
        self.base, experts = opened_together(base, directories, cache_dir, auto_class)
        self.loader = getattr(transformers, auto_class)
        self.vectors = TaskVectors.from_weights(
            self.base.weights(),
            {name: expert.weights() for name, expert in experts.items()},
            exclude=exclude_patterns(unused_tensors(self.base, auto_class), self.base.headers),
            tied=tied(self.base),
        )
        self.model = load_resident(
            self.base, dtype=torch.float32, device="cpu", auto_class=auto_class
        )
        views = writable_views(self.model)
        names = aligned(views, self.base.headers)
        targets = {names[name]: view for name, view in views.items()}
        self.merger = Merger(self.vectors, targets=targets, engine="eager")

    def logits(self, plan, name="llama_tied"):
        self.merger.apply(plan)
        return logits(self.model, name)

    def saved(self, plan, out, name="llama_tied"):
        save_model(self.merger.merged(plan), out, like=self.base)
        model, report = self.loader.from_pretrained(out, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        return logits(model, name)

    def check(self, plan, expected, out, name="llama_tied"):
        torch.testing.assert_close(self.logits(plan, name), expected, atol=ATOL, rtol=0)
        torch.testing.assert_close(self.saved(plan, out, name), expected, atol=ATOL, rtol=0)

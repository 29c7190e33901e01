"""Finds the best merge of several fine-tuned experts of one base model, by itself."""

from typing import TYPE_CHECKING, Any

from searchmerge.errors import SearchMergeError
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.classifier import load_classifier
    from searchmerge.merging.merger import merge_weights

__all__ = ["MergePlan", "SearchMergeError", "load_classifier", "merge_weights"]


def __getattr__(name: str) -> Any:
    """Import torch only where it is needed."""
    if name == "merge_weights":
        from searchmerge.merging.merger import merge_weights

        return merge_weights
    if name == "load_classifier":
        from searchmerge.classifier import load_classifier

        return load_classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Racing: stopping a candidate once its blocks say that it will not win."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

from searchmerge.evaluators.evaluator import Part

BlockMeans = Mapping[tuple[str, Part, int], float]
"""Block key to the block's part of the objective: its mean score, in the objective's units."""


@dataclass(frozen=True, slots=True)
class Racing:
    """A paired sequential test of a candidate against the best that was scored in full.

    A Wilcoxon signed-rank test on the differences of block means, one-sided, after every round.

    Attributes:
        p_threshold: The candidate is stopped below this p-value, in (0, 1).
        min_blocks: Blocks that are scored before anything is decided.
    """

    p_threshold: float = 0.05
    min_blocks: int = 8

    def stops(self, candidate: BlockMeans, best: BlockMeans) -> bool:
        """Return whether ``candidate`` is worse than ``best`` with confidence.

        Args:
            candidate: What is known of the candidate so far.
            best: All blocks of the best.
        """
        differences = np.array([value - best[key] for key, value in candidate.items()])
        if len(differences) < self.min_blocks or differences.mean() >= 0:
            return False
        if not differences.any():
            return False
        test = wilcoxon(differences, alternative="less", zero_method="zsplit")
        return bool(test.pvalue < self.p_threshold)


def paired_estimate(
    candidate: Mapping[str, Sequence[tuple[float, float]]], best_scores: Mapping[str, float]
) -> dict[str, float]:
    """Return the task scores a candidate would have, from the blocks it shares with the best.

    Args:
        candidate: Task name to pairs of block means, the candidate's and the best's.
        best_scores: Task name to the best's score over all blocks.

    Returns:
        Task name to the best's score plus the mean difference; the best's where no block of
        that task is known.
    """
    return {
        task: best_scores[task]
        + (float(np.mean([c - b for c, b in candidate[task]])) if candidate.get(task) else 0.0)
        for task in best_scores
    }

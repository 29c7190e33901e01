"""The papers' equations in float64 NumPy, written down anew and without any cleverness.

Every function takes task vectors ``(n_experts, d)`` and returns the merged one ``(d,)``.
"""

import hashlib

import numpy as np


def linear(deltas, coefficients):
    weights = np.asarray(coefficients, float)
    return weights @ deltas / weights.sum()


def task_arithmetic(deltas, coefficients):
    return np.asarray(coefficients, float) @ deltas


def trimmed(deltas, densities):
    """Keep what is at least the k-th smallest magnitude, k = d - int(d * density) from 1."""
    kept = np.zeros_like(deltas)
    d = deltas.shape[1]
    for own, target, density in zip(deltas, kept, densities, strict=True):
        k = d - int(d * density)
        threshold = np.sort(np.abs(own))[k - 1] if k > 0 else 0.0
        target[np.abs(own) >= threshold] = own[np.abs(own) >= threshold]
    return kept


def ties(deltas, coefficients, densities, aggregate="mean"):
    kept = trimmed(deltas, densities)
    signs = np.sign(kept.sum(0))
    signs[signs == 0] = np.sign(signs.sum())
    merged = np.zeros(deltas.shape[1])
    for p, sign in enumerate(signs):
        # with no majority at all, what is negative counts as agreeing, except for max
        wanted = sign if sign else -1.0
        agreeing = [i for i in range(len(kept)) if kept[i, p] * wanted > 0]
        if not agreeing:
            continue
        numbers = [coefficients[i] * kept[i, p] for i in agreeing]
        if aggregate == "mean":
            merged[p] = sum(numbers) / len(numbers)
        elif aggregate == "sum":
            merged[p] = sum(numbers)
        else:
            largest = max(abs(kept[i, p]) for i in agreeing)
            factors = [coefficients[i] for i in agreeing if abs(kept[i, p]) == largest]
            merged[p] = sign * largest * np.mean(factors)
    return merged


def pcb(deltas, coefficients, densities, variant="reference"):
    n, d = deltas.shape
    ratio = 1e-4 if variant == "reference" else 1e-2
    total, weights = np.zeros(d), np.zeros(d)
    ordered = np.sort(np.abs(deltas), axis=1)
    low, high = ordered[:, int(d * ratio)], ordered[:, int(d * (1 - ratio) - 1)]
    clamped = np.clip(np.abs(deltas), low[:, None], high[:, None])
    scaled = (clamped - low[:, None]) / (high - low)[:, None]
    signed = np.sign(deltas) * scaled
    for i in range(n):
        if variant in ("reference", "nlp"):
            inter = np.tanh(deltas[i] * deltas.sum(0))
        elif variant == "vision":
            inter = np.tanh(deltas[i] * signed.sum(0))
        else:
            inter = sum(np.tanh(signed[i] * signed[j]) for j in range(n))
        balance = np.exp(n * scaled[i] ** 2) * inter
        dropped = np.sort(balance)[min(d - 1, int(d * (1 - densities[i])))]
        span = balance.max() - dropped
        share = (np.maximum(balance, dropped) - dropped) / span if span else np.zeros(d)
        total += coefficients[i] * np.sign(deltas[i]) * clamped[i] * share
        weights += share
    return total / np.maximum(weights, 1e-12)


def elected(deltas, coefficients):
    """The mean of what has the elected sign: TIES without its trimming."""
    return ties(deltas, coefficients, [1.0] * len(deltas))


def draws(seed, expert, name, n):
    """Whole numbers below 2^24, one per entry, in wrapping 32-bit arithmetic."""
    digest = hashlib.blake2b(repr((seed, expert, name)).encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "big") // 2
    position = np.arange(n, dtype=np.uint64)
    low, high = position.astype(np.uint32), (position >> np.uint64(32)).astype(np.uint32)

    def mixed(x, factor):
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(factor)
        return x ^ (x >> np.uint32(15))

    x = mixed(low ^ np.uint32(key % 2**32), 0x7FEB352D)
    x = mixed(x ^ (high + np.uint32(key // 2**32)), 0x045D9F3B)
    return x >> np.uint32(8)


def dare(deltas, coefficients, densities, drawn, *, election="none", rescale=True):
    """Entries whose draw, of 2^24, is below the density stay."""
    kept = np.zeros_like(deltas)
    for i, density in enumerate(densities):
        stays = drawn[i] < round(density * 2**24)
        factor = 1 / density if rescale and density else 1.0
        kept[i] = np.where(stays, deltas[i] * factor, 0.0)
    merge = elected if election == "ties" else task_arithmetic
    return merge(kept, coefficients)

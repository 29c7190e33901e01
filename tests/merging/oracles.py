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
    balances, clamped = pcb_balances(deltas, variant)
    total, weights = np.zeros(deltas.shape[1]), np.zeros(deltas.shape[1])
    for i, balance in enumerate(balances):
        dropped = pcb_dropped(balance, densities[i])
        span = balance.max() - dropped
        share = (np.maximum(balance, dropped) - dropped) / span if span else np.zeros(len(balance))
        total += coefficients[i] * np.sign(deltas[i]) * clamped[i] * share
        weights += share
    return total / np.maximum(weights, 1e-12)


def pcb_balances(deltas, variant):
    """How each expert's entries compete, and their clamped magnitudes."""
    n, d = deltas.shape
    ratio = 1e-4 if variant == "reference" else 1e-2
    ordered = np.sort(np.abs(deltas), axis=1)
    low, high = ordered[:, int(d * ratio)], ordered[:, int(d * (1 - ratio) - 1)]
    clamped = np.clip(np.abs(deltas), low[:, None], high[:, None])
    scaled = (clamped - low[:, None]) / (high - low)[:, None]
    signed = np.sign(deltas) * scaled
    balances = []
    for i in range(n):
        if variant in ("reference", "nlp"):
            inter = np.tanh(deltas[i] * deltas.sum(0))
        elif variant == "vision":
            inter = np.tanh(deltas[i] * signed.sum(0))
        else:
            inter = sum(np.tanh(signed[i] * signed[j]) for j in range(n))
        balances.append(np.exp(n * scaled[i] ** 2) * inter)
    return balances, clamped


def pcb_dropped(balance, density):
    """The heaviest balance that is dropped."""
    return np.sort(balance)[min(len(balance) - 1, int(len(balance) * (1 - density)))]


def pcb_tied(deltas, densities, variant, closeness):
    """Which entries have a balance that is the heaviest dropped but for rounding.

    In exact arithmetic they are dropped with it; in float32 the last bit of exp and tanh, or the
    order of a sum, tells those that are equal apart, and one that is above by a bit is kept whole.
    """
    balances, _ = pcb_balances(deltas, variant)
    dropped = [pcb_dropped(*of) for of in zip(balances, densities, strict=True)]
    distances = [
        np.abs(b - least) / max(abs(least), 1e-30)
        for b, least in zip(balances, dropped, strict=True)
    ]
    return np.min(distances, axis=0) <= closeness


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


def magmax(deltas, coefficients):
    merged = np.zeros(deltas.shape[1])
    for p, column in enumerate(deltas.T):
        chosen = [i for i, x in enumerate(column) if abs(x) == max(abs(column))]
        merged[p] = np.mean([coefficients[i] * column[i] for i in chosen])
    return merged


def consensus(deltas, coefficients, thresholds, agreement):
    total = deltas.sum(0)
    useful = [
        abs(own) >= threshold * abs(total - own)
        for own, threshold in zip(deltas, thresholds, strict=True)
    ]
    keeps = np.sum(useful, 0) >= min(agreement, len(deltas))
    return np.where(keeps, task_arithmetic(deltas, coefficients), 0.0)


def breadcrumbs(deltas, coefficients, densities, outliers):
    """Of one tensor."""
    kept, n = np.zeros_like(deltas), deltas.shape[1]
    for i, own in enumerate(deltas):
        ordered = np.sort(abs(own))
        n_small = min(n - 1, int(n * max(0, round(1 - densities[i] - outliers[i], 9))))
        high = max(n - int(n * outliers[i]), n_small + 1)
        low, high = ordered[n_small], ordered[high - 1]
        stays = (abs(own) >= low) & (abs(own) <= high)
        kept[i, stays] = own[stays]
    return task_arithmetic(kept, coefficients)


def della(deltas, coefficients, densities, windows, drawn, *, election):
    """Of one tensor; ``deltas`` is ``(n_experts, rows, columns)``."""
    kept = np.zeros_like(deltas)
    for i, matrix in enumerate(deltas):
        width = min(windows[i], 2 * densities[i], 2 * (1 - densities[i]))
        for r, row in enumerate(matrix):
            order = sorted(range(len(row)), key=lambda p: (abs(row[p]), p))
            for rank, p in enumerate(order):
                place = rank / (len(row) - 1) if len(row) > 1 else 0.5
                chance = densities[i] + (place - 0.5) * width
                if drawn[i][r * len(row) + p] < chance * 2**24:
                    kept[i, r, p] = row[p] / chance
    flat = kept.reshape(len(kept), -1)
    merge = elected if election == "ties" else task_arithmetic
    return merge(flat, coefficients)


def sce(deltas, coefficients, density):
    """Of one tensor."""
    n = deltas.shape[1]
    variance = deltas.var(0)
    variance[(deltas == deltas[0]).all(0)] = 0
    n_selected = n if density == 1 or not variance.any() else 0
    n_selected = n_selected or max(1, int(np.count_nonzero(variance) * density))
    least = np.sort(variance)[n - n_selected] * (1 - 1e-9)
    chosen = np.where(variance >= least, deltas, 0.0)
    energies = (chosen**2).sum(1)
    if not energies.sum():
        return np.zeros(n)
    weights = energies / energies.sum()
    signs = np.where(chosen.sum(0) >= 0, 1, -1)
    agrees = (chosen * signs > 0) * weights[:, None]
    divisor = agrees.sum(0)
    total = (agrees * chosen * np.asarray(coefficients)[:, None]).sum(0)
    return np.divide(total, divisor, out=np.zeros(n), where=divisor > 0)


def model_stock(deltas, coefficients):
    """Of one tensor."""
    moved = [own for own in deltas if own.any()]
    n = len(moved)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(moved)
        for b in moved[:i]
    ]
    cosine = np.mean(cosines) if cosines else 1.0
    if not n or cosine <= 0:
        return np.zeros(deltas.shape[1])
    t = min(1.0, n * cosine / (1 + (n - 1) * cosine))
    return t / n * task_arithmetic(deltas, coefficients)


def slerp(one, other, weight):
    """Of one tensor, and two experts."""
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - weight) * angle) * one + np.sin(weight * angle) * other) / np.sin(angle)


def polar(matrix):
    """The factor with orthonormal columns, or rows, of the polar decomposition."""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


def tsv(deltas, coefficients):
    """Of one matrix; ``deltas`` is ``(n_experts, rows, columns)``."""
    n = len(deltas)
    k = max(1, min(deltas.shape[1:]) // n)
    parts = [np.linalg.svd(own) for own in deltas]
    left = polar(np.hstack([u[:, :k] for u, _, _ in parts]))
    right = polar(np.hstack([v[:k].T for _, _, v in parts]))
    sizes = np.concatenate([c * s[:k] for c, (_, s, _) in zip(coefficients, parts, strict=True)])
    return left @ np.diag(sizes) @ right.T


def iso_c(deltas, coefficients):
    """Of one matrix of full rank."""
    total = np.tensordot(coefficients, deltas, 1)
    return polar(total) * np.linalg.svd(total, compute_uv=False).mean()

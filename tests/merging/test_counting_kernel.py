"""The kernel counts what torch's operations count; Triton's interpreter runs it on a CPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import numpy as np, torch
from searchmerge.merging import counting_kernel
from searchmerge.merging.counting import (
    MOST_CUTS, RUN, Part, Wanted, count, new_counters
)

def counters(rows, every, capacity=50_000, n_cuts=MOST_CUTS):
    wanted = []
    for i, keys in enumerate(rows):
        cuts = np.unique(keys.numpy())[:: max(1, len(keys) // n_cuts)][:n_cuts].astype(np.int64)
        wanted.append(Wanted(cuts, np.arange(len(cuts) + 1) % 3 == i % 3, every))
    return new_counters(wanted, capacity, torch.device("cpu"))

def same(one, other):
    counts = one.counts[:, :-1], other.counts[:, :-1]  # the last one counts no numbers
    assert torch.equal(*counts) or not one.has_cuts
    assert torch.equal(one.n_collected, other.n_collected)
    for row in range(len(one.counts)):
        assert torch.equal(one.keys(row).sort().values, other.keys(row).sort().values)

from searchmerge.merging.counting import keys_of
draw = torch.Generator().manual_seed(0)
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    for n in (1, 31, 4096, 9001) if dtype == torch.bfloat16 else (5003,):
        for n_rows, every in ((1, 1), (5, 3)):
            base = torch.randn(n, generator=draw).to(dtype)
            experts = [
                (base.double() + 1e-3 * torch.randn(n, generator=draw)).to(dtype)
                for _ in range(n_rows)
            ]
            experts[0][: n // 3] = base[: n // 3]
            keys = [keys_of((e.float() - base.float()).abs()) for e in experts]
            some, others = counters(keys, every), counters(keys, every)
            count([Part(experts, base, 11)], some)
            counting_kernel.count([Part(experts, base, 11)], others)
            same(some, others)
rows = [torch.randn(9000, generator=draw) * 10.0**i for i in range(-40, 8, 12)]
rows[0][:50] = -0.0
for n_cuts, every in ((MOST_CUTS, 1), (3, 2)):
    keys = [keys_of(row) for row in rows]
    some, others = (counters(keys, every, n_cuts=n_cuts) for _ in range(2))
    count([Part(rows)], some)
    counting_kernel.count([Part(rows)], others)
    same(some, others)
none = [Wanted(np.empty(0, np.int64), np.ones(1, np.bool_), 7)] * len(rows)
some, others = (new_counters(none, 9000, torch.device("cpu")) for _ in range(2))
count([Part(rows, first_run=5)], some)
counting_kernel.count([Part(rows, first_run=5)], others)
same(some, others)

# several parts at once, of unlike sizes and dtypes, aligned and not; many programs of the first
short = torch.bfloat16
sizes = [(70_000, short), (48, short), (33, short), (160, torch.float32)]
parts, first_run = [], 3
for i, (n, dtype) in enumerate(sizes):
    base = torch.randn(n + 1, generator=draw).to(dtype)[i % 2 :][:n]
    experts = [(base + 0.01 * torch.randn(n, generator=draw)).to(dtype) for _ in range(3)]
    if n == 160:
        experts[2] = experts[2].double()
    parts.append(Part(experts, base, first_run))
    first_run += -(-n // RUN)
keys = [
    torch.cat([keys_of((p.rows[i].float() - p.base.float()).abs()) for p in parts])
    for i in range(3)
]
for every, n_cuts in ((1, MOST_CUTS), (3, 9)):
    some, others = (counters(keys, every, 200_000, n_cuts) for _ in range(2))
    count(parts, some)
    counting_kernel.count(parts, others)
    same(some, others)
print("the same")
"""


def test_the_kernel_counts_what_operations_count():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.stdout.strip() == "the same", done.stderr[-3000:]

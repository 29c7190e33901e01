"""Checks and measures everything on this machine's GPU: one command, within a budget.

    python tests/gpu/check.py [--out figures.jsonl] [--budget 450] [--device cuda:0]
                              [--only golden merging statistics TSV scoring study gradient methods]

Needs nothing but the tree, torch and the product's own packages: models, data and tasks are made
here, from seeds. PYTHONPATH decides which copy of the product runs; without it, the tree's does.
The most important comes first: the authors' outputs, merging beside a copy, statistics, matrices
taken apart, scoring beside lm-eval's HFLM, a study from its file to its model, gradients. A step
that fails is noted and the rest goes on; what there was no time for is named. Figures are printed
as they come and appended to the file, one JSON object a line. The exit code is 1 if anything
failed; targets that were missed are named, and fail nothing.

With ``--small`` all of it runs in small, on a CPU too.
"""

import argparse
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = ("golden", "merging", "statistics", "TSV", "scoring", "study", "gradient", "methods")
"""What can be chosen, in the order in which each begins."""

for _switch, _value in {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_switch, _value)


def use_tree() -> None:
    """Let ``tests`` be this tree's, whatever is installed; the product too if none is."""
    sys.path.append(str(ROOT))
    file = ROOT / "tests" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "tests", file, submodule_search_locations=[str(file.parent)]
    )
    if spec is None:
        raise ImportError(f"{file} is not there")
    sys.modules["tests"] = importlib.util.module_from_spec(spec)


def facts(device: str) -> dict[str, Any]:
    """Return what was measured, and where."""
    import torch

    import searchmerge
    from tests.benchmarks.bench_merging import GIB, device_name

    found: dict[str, Any] = {
        "device": device_name(device),
        "driver": _driver(),
        "product": str(Path(searchmerge.__file__).parent),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }
    for name in ("triton", "transformers", "lm_eval", "optuna"):
        found[name] = _version(name)
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        found["device GiB"] = f"{free / GIB:.1f} free of {total / GIB:.1f}"
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return told.stdout.strip().splitlines()[0] if told.stdout.strip() else "unknown"


def steps(options: argparse.Namespace, folder: Path) -> Iterator[Any]:
    """Yield what is measured, the most important first."""
    from tests.gpu.gradient import Gradient
    from tests.gpu.merging import Bench
    from tests.gpu.scoring import Scoring
    from tests.gpu.study import Study

    folders = {name: folder / name for name in ("merging", "scoring", "study")}
    for own in folders.values():
        own.mkdir()
    device, small = options.device, options.small
    engines = tuple(options.engines)
    bench = Bench(device, engines, small, folders["merging"], 2 if small else 9)
    scoring = Scoring(device, small, folders["scoring"])
    yield from bench.first()
    yield from scoring.steps()
    yield from Study(device, bench.fastest, small, folders["study"]).steps()
    yield from Gradient(device, engines, small).steps()
    yield from scoring.more()
    yield from bench.more()


def main() -> None:
    """Run all that there is time for; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the figures, one JSON object a line")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="in small, e.g. on a CPU")
    parser.add_argument(
        "--engines", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"]
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    options = parser.parse_args()
    if options.device == "cuda":
        options.device = "cuda:0"
    use_tree()
    warnings.simplefilter("ignore")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    from tests.gpu.report import Report, open_file

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ["SEARCHMERGE_CACHE"] = str(folder / "cache")
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        file = open_file(options.out)
        report = Report(options.device, options.budget, file, is_patient=options.small)
        report.header(facts(options.device))
        for step in steps(options, folder):
            if step.section in options.only:
                report.step(step)
        is_right = report.summary()
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()

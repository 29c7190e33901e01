"""What guards a resume: all that may change a score, as plain data."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from searchmerge.errors import SpecError
from searchmerge.search.references import reference_plans
from searchmerge.study import Study
from searchmerge.watch import Content

_PACKAGES = ("searchmerge", "torch", "transformers")


def fingerprint(study: Study, content: Content, device: str) -> dict[str, Any]:
    """Return all that may change a score.

    Args:
        study: The study.
        content: What its models hold.
        device: The torch device that candidates are scored on.
    """
    return {
        "study": study.spec.canonical(),
        "space": study.space.describe(),
        "references": {n: plan.digest for n, plan in reference_plans(study.experts).items()},
        "checkpoints": content,
        "files": _hashes_of_files(study),
        "device": device.partition(":")[0],
        "versions": versions(study),
    }


def versions(study: Study) -> dict[str, str]:
    """Return the versions of what merges and scores.

    Raises:
        SpecError: If a package is needed that is not installed.
    """
    names = list(_PACKAGES)
    for name, kind in study.spec.kinds.items():
        names += kind.packages(study.spec.section(name))
    try:
        return {name: importlib.metadata.version(name) for name in dict.fromkeys(names)}
    except importlib.metadata.PackageNotFoundError as error:
        raise SpecError(
            f"{study.file}: the package {error.name} is needed and not installed: "
            f"pip install 'searchmerge[{error.name}]'"
        ) from error


def _hashes_of_files(study: Study) -> dict[str, str]:
    """Return a hash of each place that holds code, task definitions or data of the user's."""
    places = {file.name: file for file in study.folder.glob("*.py")}
    for name, kind in study.spec.kinds.items():
        tasks, section = study.spec.keys_of(name), study.spec.section(name)
        places |= {place: Path(study.resolve(place)) for place in kind.places(tasks, section)}
        places |= {str(file): file for file in kind.referred(tasks, section, study.folder)}
    return {name: _hash_of(place) for name, place in sorted(places.items()) if place.exists()}


def _hash_of(place: Path) -> str:
    """Return a hash of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
    for file in files:
        if "__pycache__" not in file.parts:
            digest.update(f"{'' if file == place else file.relative_to(place)}\0".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]

"""What guards a resume: all that may change a score, as plain data."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from searchmerge.errors import SpecError
from searchmerge.models import Models
from searchmerge.study import Study

_PACKAGES = ("searchmerge", "torch", "transformers")


def fingerprint(study: Study, models: Models, device: str) -> dict[str, Any]:
    """Return all that may change a score.

    Args:
        study: The study.
        models: Its models.
        device: The torch device that candidates are scored on.
    """
    return {
        "study": study.spec.canonical(),
        "space": study.space.describe(),
        "checkpoints": models.fingerprints(),
        "task_files": _hash_of_files(study),
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


def _hash_of_files(study: Study) -> str:
    """Return a hash of the local task definitions, of the user's modules and of all local data."""
    places: list[Path] = []
    for name, kind in study.spec.kinds.items():
        named = kind.places(study.spec.keys_of(name), study.spec.section(name))
        places += [Path(study.resolve(place)) for place in named]
    digest = hashlib.sha256()
    for place in dict.fromkeys(place for place in places if place.exists()):
        files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                name = file.name if file == place else str(file.relative_to(place))
                digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]

"""What a run config may say: what can only change the time taken."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from searchmerge.merging.engine import EngineKind
from searchmerge.yaml_file import read_yaml


class RunConfig(BaseModel):
    """A file in ``configs/``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    executor: Literal["local"] = "local"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    engine: EngineKind = "auto"
    runs_dir: str = "runs"


def read_config(path: Path | None) -> RunConfig:
    """Return the config in a file; the default one where none is given.

    Raises:
        SpecError: If it cannot be read; it names file, line and key.
    """
    return RunConfig() if path is None else read_yaml(path, RunConfig)

"""What a run config may say: on which machine a study runs, and how its trials are kept there.

Of all this the kind of device alone may change a score by more than rounding, and a study keeps
to that it began on. The engine, the memory that is kept, and whether there is a C++ compiler
decide how merges are rounded.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from searchmerge.machine import available_cores, crowding
from searchmerge.merging.engine import EngineKind
from searchmerge.merging.residency import Memory, Residency
from searchmerge.spec import Duration
from searchmerge.yaml_file import read_yaml

_ADDRESS = re.compile(r"local|auto|[^/\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")


class RayConfig(BaseModel):
    """Where a Ray study's workers are, and what each of them needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    address: str = "local"
    workers: int | None = Field(default=None, ge=1)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    deadline: Duration | None = None
    loading_deadline: Duration = 3600.0

    @field_validator("address")
    @classmethod
    def _known_form(cls, value: str) -> str:
        if not _ADDRESS.fullmatch(value):
            raise ValueError(f"allowed: local, auto, host:port; found {value!r}")
        return value

    @field_validator("cpus_per_worker", "gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"a fraction below 1 or a whole number is needed; found {value:g}")
        return value


class RunConfig(BaseModel):
    """A file in ``configs/``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    executor: Literal["local", "ray"] = "local"
    ray: RayConfig | None = None
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    engine: EngineKind = "auto"
    residency: Residency = "auto"
    keep_memory: float | None = Field(default=None, ge=0)
    runs_dir: str = "runs"
    storage: str | None = Field(default=None, repr=False)  # may hold a password

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        if self.ray is not None and self.executor != "ray":
            raise ValueError("ray belongs to executor: ray")
        return self

    @property
    def memory(self) -> Memory:
        """Return where base and experts lie, and how much methods may keep."""
        keep = self.keep_memory
        return Memory(self.residency, None if keep is None else int(keep * 2**30))

    @property
    def workers(self) -> RayConfig:
        """Return where the Ray workers are; what is left out has its default."""
        return self.ray or RayConfig()

    @property
    def devices_per_worker(self) -> int:
        """Return how many devices a worker's model is spread over."""
        return max(1, int(self.workers.gpus_per_worker)) if self.executor == "ray" else 1

    @property
    def is_here(self) -> bool:
        """Return whether the workers are on this machine."""
        return self.executor == "local" or self.workers.address == "local"

    @property
    def n_workers_here(self) -> int:
        """Return how many workers this machine has; 1 where its GPUs decide."""
        if self.executor == "local":
            return 1
        fitting = int(available_cores() / self.workers.cpus_per_worker)
        return self.workers.workers or (1 if self.workers.gpus_per_worker else max(1, fitting))

    def crowding(self) -> str:
        """Return a few words where others use the processors of the workers' machine too.

        Nothing where the workers are elsewhere.
        """
        return crowding() if self.is_here else ""

    def worker_threads(self) -> int:
        """Return how many threads a Ray worker has: a whole one per CPU that it may use."""
        return self.threads or min(max(1, int(self.workers.cpus_per_worker)), available_cores())


def read_config(path: Path | None) -> RunConfig:
    """Return the config in a file; the default one where none is given.

    Raises:
        SpecError: If it cannot be read; it names file, line and key.
    """
    return RunConfig() if path is None else read_yaml(path, RunConfig)

"""The nodes of a cluster: how many workers each has room for, and where they do not load."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from searchmerge.errors import StudyError
from searchmerge.execution.ray.cluster import RaySettings, amounts, place

_logger = logging.getLogger(__name__)

MAX_LOAD_DEATHS = 3
"""Workers that may die in a row as they load on a node before it has to do with fewer."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's name of it.
        host: What its machine is called.
        resources: Resource to amount, all that it has.
    """

    id: str
    host: str
    resources: Mapping[str, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Return a node as ``ray.nodes()`` tells of it."""
        return cls(row["NodeID"], row["NodeManagerHostname"], row["Resources"])

    def room(self, settings: RaySettings) -> int:
        """Return how many workers fit on it, if nothing else runs there."""
        return min(
            int(self.resources.get(name, 0.0) / need + 1e-9)
            for name, need in (("CPU", settings.cpus), ("GPU", settings.gpus))
            if need
        )


class Nodes:
    """The nodes that there are, as they come and go.

    Args:
        settings: What each worker needs.
    """

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._alive: dict[str, Node] = {}
        self._n_died: Counter[str] = Counter()
        self._told: set[str] = set()
        self._most: dict[str, int] = {}  # workers at a node where some do not load

    def update(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of what ``ray.nodes()`` says, and name a node that is too small."""
        self._alive = {row["NodeID"]: Node.of(row) for row in rows if row["Alive"]}
        if not self.room:
            return
        for node in self._alive.values():
            # a head with no processors is there for the driver alone
            is_small = not node.room(self._settings) and amounts(node.resources) != "none"
            if is_small and node.id not in self._told:
                self._told.add(node.id)
                _logger.warning(
                    "node %s is not used: it has %s, and a worker needs %s",
                    node.host,
                    amounts(node.resources),
                    self._settings.needs,
                )

    def __contains__(self, node: str) -> bool:
        return node in self._alive

    def __len__(self) -> int:
        return len(self._alive)

    @property
    def room(self) -> int:
        """How many workers there can be."""
        return sum(map(self._room, self._alive.values()))

    def _room(self, node: Node) -> int:
        room = node.room(self._settings)
        return min(room, self._most.get(node.id, room))

    @property
    def n_wanted(self) -> int:
        """How many workers there are to be: as many as are asked for, or as there can be."""
        return self._settings.workers or max(1, self.room)

    def check_room(self) -> None:
        """Refuse nodes without room for a worker, and a single machine without room for all.

        Raises:
            StudyError: If there is too little.
        """
        room, wanted = self.room, self._settings.workers or 1
        if room >= wanted:
            return
        there: Counter[str] = Counter()
        for node in self._alive.values():
            there.update(node.resources)
        shortage = (
            f"{wanted} workers of {self._settings.needs} each were asked for; "
            f"{place(self._settings.address)} has {amounts(there)}, room for {room}"
        )
        if room == 0 or self._settings.address == "local":
            raise StudyError(
                f"{shortage}; lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker"
            )
        _logger.warning("%s; the others start when nodes join", shortage)

    def full(self, n_workers: Mapping[str, int]) -> list[str]:
        """Return the nodes where no further worker may be put, since some do not load there.

        Args:
            n_workers: Node to how many workers it has.
        """
        return sorted(
            node
            for node, most in self._most.items()
            if node in self._alive and n_workers.get(node, 0) >= most
        )

    def loaded(self, node: str) -> None:
        """Take note that a worker has loaded on a node."""
        del self._n_died[node]

    def died_loading(self, node: str, n_others: int) -> int:
        """Count a worker that died as it loaded on a node, beside ``n_others`` that it has.

        Every ``MAX_LOAD_DEATHS`` in a row the node is given no more than those: where one device
        of many is broken, a single death says nothing of the others.

        Returns:
            How many died so in a row.
        """
        self._n_died[node] += 1
        n_died = self._n_died[node]
        if n_died % MAX_LOAD_DEATHS == 0 and node in self._alive:
            self._most[node] = n_others
            _logger.warning(
                "%d workers in a row died as they loaded on node %s: it is given no more than "
                "the %d that it has",
                n_died,
                self._alive[node].host,
                n_others,
            )
        return n_died

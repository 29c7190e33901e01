"""Finding lm-eval's tasks, groups and tags by name."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from searchmerge.errors import SpecError

_logger = logging.getLogger(__name__)


class Catalogue:
    """Finds lm-eval tasks by name: the user's own first, then the thousands that it brings.

    Args:
        include_path: Folders of the user's task YAMLs; a later one comes before an earlier.
        metadata: What lm-eval hands to every task that asks for it, e.g. RULER's lengths.
    """

    def __init__(
        self,
        include_path: Sequence[Path] = (),
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        for folder in include_path:
            if not folder.is_dir():
                raise SpecError(f"lm_harness.include_path: no folder {folder}")
        self._include_path = [str(folder) for folder in include_path]
        self._metadata = dict(metadata or {})

    @cached_property
    def _named(self) -> Any:
        return self._manager(include_defaults=False)

    @cached_property
    def _all(self) -> Any:
        _logger.info("indexing lm-eval's tasks, which takes some seconds")
        return self._manager(include_defaults=True)

    def _manager(self, *, include_defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(
            include_path=list(self._include_path) or None,
            include_defaults=include_defaults,
            metadata=self._metadata or None,
        )

    def find(self, asked: str | Mapping[str, Any], where: str) -> "Leaf | Branch":
        """Return a task, or a group or tag with all its members.

        Args:
            asked: A name of lm-eval's or of the user's, or the definition of a task.
            where: Where the study says so, for messages.

        Raises:
            SpecError: If there is no such task, or a member of a group does not exist.
        """
        if not isinstance(asked, str):
            return Leaf(str(asked.get("task") or "inline"), self._named, overrides=asked)
        manager = self._named if asked in self._named.all_tasks else self._all
        return self._tree(manager, asked, {}, (), where)

    def _tree(
        self,
        manager: Any,
        name: str,
        overrides: Mapping[str, Any],
        path: tuple[str, ...],
        where: str,
    ) -> "Leaf | Branch":
        names = {*manager.all_subtasks, *manager.all_groups, *manager.all_tags}
        if name not in names:
            close = get_close_matches(name, names, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            folders = f" or in {', '.join(self._include_path)}" if self._include_path else ""
            member = f", a member of {path[-1]!r}," if path else ""
            raise SpecError(f"{where}: no task named {name!r}{member} in lm-eval{folders}{hint}")
        entry = manager.task_index[name]
        if name in manager.all_tags:
            members = sorted(entry.tags)
            return self._branch(manager, name, {"task": members}, overrides, path, where)
        if name in manager.all_groups:
            return self._branch(manager, name, entry.cfg or {}, overrides, path, where)
        return Leaf(name, manager, entry, overrides, path)

    def _branch(
        self,
        manager: Any,
        name: str,
        config: Mapping[str, Any],
        overrides: Mapping[str, Any],
        path: tuple[str, ...],
        where: str,
    ) -> "Branch":
        if name in path:
            raise SpecError(f"{where}: the group {name!r} is a member of itself")
        listed = config.get("task") or []
        children: list[Leaf | Branch] = []
        for item in [listed] if isinstance(listed, str) else listed:
            keys = dict(item) if isinstance(item, Mapping) else {"task": item}
            inner = (*path, name)
            group = keys.pop("group", None)
            if group is not None and group not in manager.task_index:
                children.append(self._branch(manager, str(group), keys, overrides, inner, where))
                continue
            member = group if group is not None else keys.pop("task")
            children.append(self._tree(manager, str(member), {**overrides, **keys}, inner, where))
        if not children:
            raise SpecError(f"{where}: the group {name!r} has no members")
        metrics = _metrics(config.get("aggregate_metric_list"), f"{where}: the group {name!r}")
        return Branch(name, tuple(children), metrics)


def _metrics(listed: Any, where: str) -> "tuple[GroupMetric, ...]":
    """Return the metrics that a group aggregates."""
    metrics = [listed] if isinstance(listed, Mapping) else listed or []
    if not isinstance(metrics, list) or not all(
        isinstance(metric, Mapping) and "metric" in metric for metric in metrics
    ):
        raise SpecError(
            f"{where} has an aggregate_metric_list that is no list of mappings, each with a "
            f"metric: {listed!r}"
        )
    return tuple(
        GroupMetric(str(m["metric"]), bool(m.get("weight_by_size", True))) for m in metrics
    )


@dataclass(frozen=True)
class Leaf:
    """A task of lm-eval's, as it stands in a group or alone.

    Attributes:
        name: Its name.
        manager: The task manager that knows it.
        entry: Its entry in the manager's index; ``None`` where the study defines it.
        overrides: Settings that replace those of its YAML.
        path: The groups that it is in, the outermost first.
    """

    name: str
    manager: Any
    entry: Any = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """Return its settings."""
        stored = {} if self.entry is None else self.entry.cfg or {}
        return {**stored, **self.overrides}

    def build(self, more: Mapping[str, Any]) -> Any:
        """Return lm-eval's task object with more settings replaced: a group of one may do so.

        A definition of the study's stands for itself, whether or not its name is also a task's.
        """
        config = {**self.overrides, **more, "task": self.name}
        if self.entry is not None:
            config = {"group": "searchmerge", "task": [config]}
        loaded = self.manager.load(config)
        return next(iter(loaded["tasks"].values()))


@dataclass(frozen=True)
class GroupMetric:
    """A metric that a group aggregates.

    Attributes:
        name: Of the metric.
        by_size: Whether members weigh by their numbers of examples, and not alike.
    """

    name: str
    by_size: bool


@dataclass(frozen=True)
class Branch:
    """A group or a tag of lm-eval's.

    Attributes:
        name: Its name.
        children: Its direct members.
        metrics: What it aggregates over all tasks within; none for a tag.
    """

    name: str
    children: "tuple[Leaf | Branch, ...]"
    metrics: tuple[GroupMetric, ...] = ()

    def leaves(self) -> "list[Leaf]":
        """Return all tasks within, in order."""
        leaves: list[Leaf] = []
        for child in self.children:
            leaves += child.leaves() if isinstance(child, Branch) else [child]
        return leaves

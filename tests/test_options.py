"""Every option of the product is set by the product itself: none is there for nobody."""

import ast
from collections import defaultdict
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import searchmerge
from searchmerge.evaluators.evaluator import EVALUATORS

ROOT = Path(searchmerge.__file__).parent

FOR_USERS = {
    "merge_weights": "the product in Python, on plain state dicts",
    "load_classifier": "the product in Python, for what a study has saved",
}
"""Functions whose options are for those who call them from their own code."""

FOR_OTHERS = {
    "tok_encode": "lm-eval calls it",
    "Registry": "a registry of a test has no package",
    "get_all_trials": "Optuna calls it",
}
"""Functions whose options are set by other packages, or are no options of a study."""

PLAYED_BY_TESTS = {
    ("VllmBackend", "start"): "the engine",
    ("available_cores", "proc"): "the machine",
    ("crowding", "load"): "the machine",
    ("crowding", "n_cores"): "the machine",
    ("StudyClock", "now"): "the clock",
    ("Head", "now"): "the clock",
    ("Roster", "now"): "the clock",
    ("AsyncCmaSampler", "sigma"): "a search that has narrowed",
    ("open_checkpoint", "cache_dir"): "the user's cache",
    ("save_model", "max_shard_bytes"): "a model of many shards",
    ("Decoder", "recorder"): "the device",
    ("Losses", "most_taught"): "the memory",
    ("select", "room"): "the memory",
}
"""What tests put in place of the world, and what it is there."""


@dataclass
class Signature:
    """The options of a function or class: what has a default."""

    place: str
    options: dict[str, int | None] = field(default_factory=dict)  # name to position


@dataclass
class Calls:
    """How the product calls what has a name."""

    keywords: set[str] = field(default_factory=set)
    n_positional: int = 0
    is_splatted: bool = False


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def options_of(arguments, skip):
    """Return the parameters that have a default, with their positions."""
    positional = [*arguments.posonlyargs, *arguments.args][skip:]
    first = len(positional) - len(arguments.defaults)
    found = {a.arg: i for i, a in enumerate(positional) if i >= first}
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return found | {a.arg: None for a, default in named if default is not None}


def is_frozen(node):
    """Return whether a class is a value: what can be set of it is set when it is made."""
    marks = [ast.unparse(mark) for mark in (*node.decorator_list, *node.bases)]
    return any(
        ("dataclass" in mark and "frozen=True" in mark) or "NamedTuple" in mark for mark in marks
    )


def fields_of(node):
    """Return the fields of a dataclass that have a default, with their positions."""
    named = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.target.id[0] != "_"]
    named = [n for n in named if "ClassVar" not in ast.unparse(n.annotation)]
    named = [n for n in named if n.value is None or "init=False" not in ast.unparse(n.value)]
    return {n.target.id: i for i, n in enumerate(named) if n.value is not None}


def signature_of(node, place):
    """Return the options of a class that is a value, or of a function; ``None`` for others."""
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if getattr(n, "name", "") == "__init__"]
        if makers:
            return Signature(place, options_of(makers[0].args, 1))
        return Signature(place, fields_of(node)) if is_frozen(node) else None
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
        return None
    if any("app." in ast.unparse(mark) for mark in node.decorator_list):
        return None  # the command line: a person sets its options
    is_method = bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
    return Signature(place, options_of(node.args, int(is_method)))


def signatures():
    """Return the options of everything, by its name; of equal names, the last that has any."""
    found = {}
    for path, tree in modules():
        for node in ast.walk(tree):
            name = getattr(node, "name", "")
            signature = signature_of(node, f"{path.relative_to(ROOT)}: {name}")
            if signature is not None and signature.options:
                found[name] = signature
    return found


def called(node, class_name):
    """Return the name that is called, and the arguments that it gets."""
    name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
    if name == "cls":
        return class_name, node.args
    if name in ("partial", "remote") and node.args:
        return ast.unparse(node.args[0]).rpartition(".")[2], node.args[1:]
    return name, node.args


def calls():
    """Return how everything is called, by its name."""
    found = defaultdict(Calls)

    def visit(node, class_name):
        if isinstance(node, ast.ClassDef):
            class_name = node.name
        if isinstance(node, ast.Call):
            name, arguments = called(node, class_name)
            call = found[name]
            call.keywords |= {keyword.arg for keyword in node.keywords if keyword.arg}
            call.n_positional = max(call.n_positional, len(arguments))
            call.is_splatted |= any(keyword.arg is None for keyword in node.keywords)
            call.is_splatted |= any(isinstance(each, ast.Starred) for each in arguments)
        for child in ast.iter_child_nodes(node):
            visit(child, class_name)

    for _, tree in modules():
        visit(tree, "")
    return found


def declared_keys():
    """Return the names of the classes whose fields are keys of a study file."""
    kinds = [EVALUATORS[name] for name in EVALUATORS]
    classes = [each for kind in kinds for each in (kind.keys, kind.section)]
    names = set()
    while classes:
        declared = classes.pop()
        if is_dataclass(declared):
            names |= {base.__name__ for base in declared.__mro__}
            hints = get_type_hints(declared).values()
            classes += [each for hint in hints for each in (hint, *get_args(hint))]
    return names


def unreached():
    made, read, replaced = calls(), declared_keys(), calls()["replace"].keywords
    for name, signature in signatures().items():
        if name in FOR_USERS | FOR_OTHERS or name in read or made[name].is_splatted:
            continue
        for option, position in signature.options.items():
            if (name, option) in PLAYED_BY_TESTS:
                continue
            by_place = position is not None and position < made[name].n_positional
            if not (option in made[name].keywords or by_place or option in replaced):
                yield f"{signature.place}({option}=)"


def test_every_option_is_reached_by_the_product():
    assert list(unreached()) == []


def test_an_option_that_nobody_sets_is_seen(monkeypatch):
    tree = ast.parse("def paint(colour='red', *, thick=False): ...\npaint('blue')\n")
    monkeypatch.setattr("tests.test_options.modules", lambda: [(ROOT / "paint.py", tree)])
    assert list(unreached()) == ["paint.py: paint(thick=)"]


@pytest.mark.parametrize("name", FOR_USERS)
def test_what_is_for_users_is_public(name):
    assert name in searchmerge.__all__

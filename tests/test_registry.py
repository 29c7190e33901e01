"""Names for what a study can choose between: filled at the first look-up, never twice."""

import sys
from textwrap import dedent

import pytest

from searchmerge.errors import SpecError
from searchmerge.registry import Registry


@pytest.fixture
def fruits():
    registry = Registry("fruit")
    for name in ("apple", "pear", "plum"):
        registry.register(name)(name.upper())
    return registry


def test_an_entry_comes_back_by_its_name_in_the_order_of_registration(fruits):
    assert fruits["pear"] == "PEAR"
    assert list(fruits) == ["apple", "pear", "plum"]
    assert len(fruits) == 3
    assert "fig" not in fruits


def test_what_is_registered_is_left_as_it_is():
    registry = Registry("fruit")

    @registry.register("fig")
    class Fig:
        pass

    assert registry["fig"] is Fig


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plumm", r"^no fruit named 'plumm'; did you mean 'plum'\? \(known: apple, pear, plum\)$"),
        ("kiwi", r"^no fruit named 'kiwi' \(known: apple, pear, plum\)$"),
        (3, r"^no fruit named 3 \(known: "),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(fruits, name, message):
    with pytest.raises(SpecError, match=message):
        fruits[name]


def test_a_name_is_registered_once(fruits):
    with pytest.raises(SpecError, match="fruit 'pear' is registered twice"):
        fruits.register("pear")("another")
    assert fruits["pear"] == "PEAR"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package whose modules register entries; one of them lies in a folder."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def package(**modules):
        sources = {
            "__init__": "",
            "registry": """
                from searchmerge.registry import Registry
                ENTRIES = Registry("entry", "orchard")
            """,
            **modules,
        }
        for name, source in sources.items():
            file = tmp_path / "orchard" / f"{name.replace('__in__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(dedent(source))
        from orchard.registry import ENTRIES

        return ENTRIES

    yield package
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "orchard":
            del sys.modules[name]


REGISTERS = """
    from orchard.registry import ENTRIES
    ENTRIES.register("{0}")("{0}")
"""


def test_modules_are_imported_at_the_first_look_up_and_not_before(package):
    entries = package(plum=REGISTERS.format("plum"), stone__in__peach=REGISTERS.format("peach"))
    assert "orchard.plum" not in sys.modules
    assert entries["plum"] == "plum"
    assert "orchard.stone.peach" in sys.modules
    assert sorted(entries) == ["peach", "plum"]


def test_a_module_may_look_names_up_while_it_is_imported(package):
    looks = "from orchard.registry import ENTRIES\nSEEN = list(ENTRIES)\n"
    entries = package(apple=looks, plum=REGISTERS.format("plum"))
    assert list(entries) == ["plum"]
    assert sys.modules["orchard.apple"].SEEN == []


def test_a_module_that_cannot_be_imported_is_heard_of_at_every_look_up(package):
    entries = package(plum="import no_such_package\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            entries["plum"]

"""Files are read into models; what is wrong is said by file, line and key."""

from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from searchmerge.errors import SpecError
from searchmerge.yaml_file import read_yaml, to_model


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bed(Strict):
    plant: str
    rows: Annotated[int, Field(ge=1)] = 1


class Garden(Strict):
    beds: list[Bed] = []
    named: dict[str, Bed] = {}
    size: Annotated[float, Field(gt=0)] = 1.0
    owner: str | None = None


TEXT = """\
# a garden
size: 2.5
beds:
  - plant: leek
  - plant: kale
    rows: 3
named:
  south: {plant: vine}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "garden.yaml"
        file.write_text(text)
        return file

    return write


def read(file, **overrides):
    return read_yaml(file, Garden, {key.replace("__", "."): v for key, v in overrides.items()})


def test_a_file_is_read_into_its_model(write):
    garden = read(write(TEXT))
    assert garden == Garden(
        size=2.5,
        beds=[Bed(plant="leek"), Bed(plant="kale", rows=3)],
        named={"south": Bed(plant="vine")},
    )


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_has_all_defaults(write, text):
    assert read(write(text)) == Garden()


def test_overrides_are_yaml_and_replace_what_the_file_says_or_leaves_out(write):
    garden = read(write(TEXT), size="4", owner="null", named__north="{plant: fern, rows: 2}")
    assert (garden.size, garden.owner, garden.named["north"].rows) == (4.0, None, 2)
    assert garden.named["south"].plant == "vine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: 0\n", r"garden\.yaml:1: size: Input should be greater than 0; found 0$"),
        (
            "beds:\n- plant: leek\n- plant: kale\n  rows: 0\n",
            r"garden\.yaml:4: beds\.1\.rows: .*greater than or equal to 1; found 0",
        ),
        ("beds:\n- rows: 2\n", r"garden\.yaml:2: beds\.0\.plant: Field required$"),
        ("\nsise: 2\n", r"garden\.yaml:2: sise: unknown key; did you mean 'size'\?$"),
        ("xyz: 2\n", r"garden\.yaml:1: xyz: unknown key$"),
        ("rows: 2\n", r"garden\.yaml:1: rows: .*not known here"),
        ("beds: [leek]\n", r"garden\.yaml:1: beds\.0: a mapping of keys is needed; found 'leek'"),
        ("size: 1\nsize: 2\n", r"garden\.yaml:2: key 'size' stands twice"),
        ("named:\n  a: {plant: x, plant: y}\n", r"garden\.yaml:2: key 'plant' stands twice"),
        ("- size\n", r"garden\.yaml: holds list; a mapping of keys is needed"),
        ("size: [1\n", r"garden\.yaml.*: not valid YAML: "),
    ],
)
def test_what_is_wrong_is_said_by_file_line_and_key(write, text, message):
    with pytest.raises(SpecError, match=message):
        read(write(text))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size.unit", "m", r"--set size\.unit: 'size' holds no keys"),
        ("size", "[1", r"--set size: not valid YAML: expected ',' or ']'"),
        ("size", "0", r"garden\.yaml: --set: size: .*greater than 0; found 0"),
        ("sise", "1", r"garden\.yaml.*: sise: unknown key; did you mean 'size'"),
    ],
)
def test_an_override_that_cannot_be_is_refused(write, key, value, message):
    with pytest.raises(SpecError, match=message):
        read_yaml(write(TEXT), Garden, {key: value})


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read(tmp_path / "nowhere.yaml")


def test_data_from_elsewhere_is_told_by_what_errors_begin_with():
    assert to_model({"size": 3}, Garden, {"size": "5"}, "--set").size == 5.0
    with pytest.raises(SpecError, match=r"^--set: size: Input should be .*found 'wide'$"):
        to_model({}, Garden, {"size": "wide"}, "--set")


class Locked(BaseModel):
    key: str | None = Field(default=None, repr=False)
    names: dict[str, int] = {}


def test_a_value_that_may_be_secret_is_not_shown(write):
    for text in ("key: [s3cret]\n", "key: {a: s3cret}\n"):
        with pytest.raises(SpecError, match=r"garden\.yaml:1: key: .*valid string$"):
            read_yaml(write(text), Locked)


def test_a_key_that_begins_with_a_capital_is_named_with_its_line(write):
    with pytest.raises(SpecError, match=r"garden\.yaml:3: names\.Math: .*; found 'x'"):
        read_yaml(write("names:\n  code: 1\n  Math: x\n"), Locked)


def test_a_long_value_is_cut(write):
    with pytest.raises(SpecError, match=r"names\.a: .*; found '[xy]+\.\.\.$"):
        read_yaml(write(f"names: {{a: {'xy' * 500}}}\n"), Locked)

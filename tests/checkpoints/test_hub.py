"""Models of the hub: their ids, and what is fetched of them; nothing here leaves the machine."""

import pytest

from searchmerge.checkpoints.hub import fetch, is_hub_id
from searchmerge.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("source", ["org/name", "Qwen/Qwen2.5-0.5B", "a/b_c", "0x/1.2-3"])
def test_an_organisation_and_a_name_are_a_hub_id(source):
    assert is_hub_id(source)


@pytest.mark.parametrize(
    "source",
    ["name", "./org/name", "/org/name", "org/name/sub", "../name", "org/", "", "org/na me", "~/m"],
)
def test_paths_are_no_hub_ids(source):
    assert not is_hub_id(source)


@pytest.fixture
def cached():
    """Put a model into the hub's cache of this session."""
    from pathlib import Path

    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    assert HF_HUB_OFFLINE
    repository = Path(HF_HUB_CACHE) / "models--searchmerge-tests--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir(exist_ok=True)
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_what_the_cache_holds_is_not_downloaded(cached, revision):
    found = fetch("searchmerge-tests/tiny", revision)
    assert found.samefile(cached)
    assert (found / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("searchmerge-tests/none", None, r"^'searchmerge-tests/none' is no local directory, and"),
        ("searchmerge-tests/tiny", "v2", r"^'searchmerge-tests/tiny' at revision 'v2' is no lo"),
    ],
)
def test_what_cannot_be_fetched_is_named_with_the_reason(cached, source, revision, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        fetch(source, revision)
    assert "could not be fetched from the Hugging Face hub: " in str(refused.value)
    assert "\n" not in str(refused.value)

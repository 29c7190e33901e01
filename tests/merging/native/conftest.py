import pytest

from searchmerge.merging.native.compiler import has_compiler

HAS_COMPILER = has_compiler()


@pytest.fixture(autouse=True)
def compiler():
    """Skip what cannot be compiled here."""
    if not HAS_COMPILER:
        pytest.skip("there is no C++ compiler")

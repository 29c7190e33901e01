"""What some tests need of the machine."""

import pytest

from searchmerge.merging.native.compiler import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

"""The README's table of what lm-eval's command line can say, held against its own parser."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[3] / "README.md"


def told():
    """Return each option of the table, and what the README says of it."""
    text = README.read_text().split("### Everything that lm_eval's command line can say")[1]
    rows = re.findall(r"^\| `(--\w+)` \| (.+) \|$", text.split("\n#")[0], flags=re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def options():
    """Return the options of ``lm_eval run --help``."""
    command = [sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^  (--\w+)", text, re.MULTILINE))


def test_every_option_of_lm_evals_command_line_is_in_the_readmes_table():
    known = options()
    assert {"--tasks", "--seed", "--metadata", "--predict_only"} <= known
    assert set(told()) == known
    assert all(told().values())

"""The numbers in the READMEs are those of the results."""

import re

import pytest

from benchmarks import tables


@pytest.mark.parametrize("path", tables.FILES, ids=["README", "benchmarks"])
def test_what_stands_between_markers_is_what_python_m_benchmarks_tables_writes(path):
    text = path.read_text()
    assert tables.filled(text, tables.texts()) == text, "run python -m benchmarks.tables"
    # Markdown takes a line that begins with a comment for HTML.
    assert not re.search(r"^<!-- [^/\n>]+ -->.", text, re.MULTILINE)


def test_new_results_replace_old_ones_and_unknown_names_are_refused():
    old = "<!-- a -->1<!-- / -->, <!-- t -->\n\n| 1 |\n\n<!-- /t --> <!-- no marker -->"
    new = tables.filled(old, {"a": "2", "t": "| 2 |\n| 3 |"})
    assert (
        new == "<!-- a -->2<!-- / -->, <!-- t -->\n\n| 2 |\n| 3 |\n\n<!-- /t --> <!-- no marker -->"
    )
    with pytest.raises(KeyError, match="the results hold no 't'"):
        tables.filled(old, {"a": "2"})

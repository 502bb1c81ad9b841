"""The README's Python runs as a user would run it, and its links lead somewhere."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
PAGES = ["README.md", "benchmarks/README.md", "benchmarks/results/cpu-2-cores/speed.md"]


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As JAX is by default, unlike in the other tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(block, {})


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text())
    links = [link for link in links if "://" not in link]
    assert links
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]

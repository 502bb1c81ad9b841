"""Sphinx: one page of API reference, from the docstrings."""

import pathlib
import re

import optax_unitscale

project = "optax-unitscale"
copyright = "the optax-unitscale authors, Apache-2.0"
release = optax_unitscale.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False

# Single backticks are code, as people who read docstrings in an editor take them.
default_role = "code"
python_maximum_signature_line_length = 80
napoleon_custom_sections = ["Numerics", "Source"]

page = (pathlib.Path(__file__).parent / "index.rst").read_text()
if sorted(re.findall(r"autofunction:: (\w+)", page)) != sorted(optax_unitscale.__all__):
    raise ValueError("index.rst does not list what optax_unitscale.__all__ does")

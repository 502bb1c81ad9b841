"""How Sphinx makes the API reference, one page, from the docstrings."""

from typing import Any

import jax
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import optax_unitscale

project = "optax-unitscale"
version = release = optax_unitscale.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]

# Single backticks: a link where they hold a name that is on the page, code where they do not.
default_role = "py:obj"
# Quotes are those of Python's strings.
smartquotes = False
napoleon_custom_sections = ["Numerics", "Source"]
maximum_signature_line_length = 80

html_theme = "alabaster"
html_theme_options = {"nosidebar": True, "page_width": "60em"}
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    """Connects the two functions below."""
    app.connect("autodoc-process-signature", name_array_like)
    app.connect("env-check-consistency", warn_of_missing_names)


def name_array_like(app, what, name, obj, options, signature: str | None, returns: str | None):
    """Calls `jax.typing.ArrayLike` by its name, for autodoc only sees the union that it is."""
    if signature is not None:
        union = stringify_annotation(jax.typing.ArrayLike, "smart")
        signature = signature.replace(union, "~jax.typing.ArrayLike")
    return signature, returns


def warn_of_missing_names(app: Sphinx, env: Any) -> None:
    """A public name that the page lacks is a warning, and by ``-W`` an error."""
    there = {name for name, *_ in env.get_domain("py").get_objects()}
    for name in optax_unitscale.__all__:
        if f"optax_unitscale.{name}" not in there:
            logging.getLogger(__name__).warning("index.rst lacks the public name %s", name)

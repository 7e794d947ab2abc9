"""Sphinx: the pages of docs/ and the notes in other folders, with the docstrings of the public API.

    make docs

The source folder is the repository's root and a page's address is its path in it, so that the same relative
links lead somewhere on a git host and in the site.
"""

from typing import Any

from trtllm_mm_cache import __version__, errors

project = "trtllm_mm_cache"
version = release = __version__
copyright = "the authors of trtllm_mm_cache; Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "models/*.md", "benchmarks/*.md"]

myst_heading_anchors = 4  # the same anchors as on a git host
myst_enable_extensions = ["html_image"]

# Docstrings are plain text: `name` is code, and a link where it names something of the API.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_extra_path = ["_extra"]  # index.html, which leads to docs/index.html
html_copy_source = False


def link_errors(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Docstrings name the errors without their module: lead those names to the page of errors."""
    name = node["reftarget"]
    if node.get("refdomain") != "py" or not hasattr(errors, name):
        return None
    python = env.domains.python_domain
    return python.resolve_xref(
        env, node["refdoc"], app.builder, "exc", f"{errors.__name__}.{name}", node, content
    )


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("missing-reference", link_errors)

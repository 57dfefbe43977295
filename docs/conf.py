"""The site, of these pages and the docstrings: `tox -e docs`.

Sphinx, since it reads the docstrings of the code as it runs, and fails where a page or a docstring
refers to what is not there. MyST, so that the pages stay plain Markdown, with links that hold wherever
they are read. Furo, for a light and a dark theme and a narrow screen.
"""

import re
from inspect import getdoc
from pathlib import Path
from typing import Generic, get_origin

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.pycode import ModuleAnalyzer

project = "governor"
author = "The governor authors"
copyright = author

# Built of the clone's root, so that links between a page and the README, say, hold on the site as well
# as where one looks at the files.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "examples/*.md"]
exclude_patterns = [".*", "build", "site"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True  # what a docstring refers to must be there
nitpick_ignore_regex = [
    ("py:(class|exc)", r"(?!governor\.)\w+\..*"),  # of other packages
    ("py:class", r"governor\._.*"),  # what a public signature names and nobody imports
    ("py:class", r"P|governor\..*\.(G|Agent)"),  # variables of types
    # Known by that name where they stand.
    ("py:(class|exc)", "ConnectTimeout|Kind|RedisError|WSGIApplication"),
]

myst_heading_anchors = 4
highlight_language = "none"

napoleon_use_ivar = True
autoclass_content = "both"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "governor"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Make the site's contents of the list of pages, which is on the first page for all to read."""
    if page == root_doc:
        for heading, text in re.findall(r"^## (.+)\n((?s:.*?))(?=^## |\Z)", source[0], re.MULTILINE):
            pages = re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", text, re.MULTILINE)
            lines = "\n".join(f"{title} <{path}>" for title, path in pages)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{lines}\n```"


def show_public_bases(app: Sphinx, name: str, cls: type, options: object, bases: list[type]) -> None:
    """In place of a private base, show those of its own that are public."""
    bases[:] = [public for base in bases for public in public_bases(get_origin(base) or base)]


def public_bases(base: type) -> list[type]:
    """Return the class if users can name it, or what they can name of its bases."""
    if not re.match(r"governor\b.*\._", f"{base.__module__}.{base.__name__}"):
        return [base]
    return [it for above in base.__bases__ if above not in (object, Generic) for it in public_bases(above)]


def restore_property(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Undo what napoleon does to a property: it takes the words before a colon for a type."""
    if what == "property":
        lines[:] = (getdoc(obj) or "").splitlines()


def name_parameters(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Name a function's parameters that are handed on, in a way that Sphinx can read."""
    return signature and signature.replace("~typing.~P", "P"), returns


def skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool:
    """Leave out the fields of a named tuple: its docstring has them, and they have none."""
    return skip or type(obj).__name__ == "_tuplegetter"


def in_order_of_source() -> None:
    """Tell autodoc the order of what the package hands on, which calls itself a part of the front door."""
    files = sorted((Path(__file__).parents[1] / "governor").glob("_*.py"))
    source = "\n".join(file.read_text("utf-8") for file in files)
    ModuleAnalyzer.cache["module", "governor"] = ModuleAnalyzer.for_string(source, "governor")


def setup(app: Sphinx) -> None:
    """Tell Sphinx of all this."""
    in_order_of_source()
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("autodoc-process-docstring", restore_property, priority=600)
    app.connect("autodoc-process-signature", name_parameters)
    app.connect("autodoc-skip-member", skip_fields)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings call them

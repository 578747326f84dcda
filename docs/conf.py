"""How Sphinx builds these pages: `make docs`. MyST Markdown, furo, API pages from Google-style docstrings."""

import re
import sys
import zlib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext import autosummary

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
sys.path.insert(0, str(REPOSITORY))  # a checkout is documented, not what is installed

from immunity_fast import __version__ as release  # noqa: E402

project = "immunity_fast"
author = "The immunity_fast authors"
copyright = f"2026, {author}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["README.md"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# `name` in a docstring is code, and a link where the name is documented here or in PyTorch.
default_role = "py:obj"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "forward, extra_repr"}
autosummary.WELL_KNOWN_ABBREVIATIONS += (" eq.", " eqs.")  # which end no sentence
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# What our docstrings name of PyTorch. An inventory of these is written here, because fetching PyTorch's own needs a
# network, and Sphinx warns where there is none.
PYTORCH = {
    "torch.Generator": "generated/torch.Generator.html",
    "torch.Tensor": "tensors.html",
    "torch.device": "tensor_attributes.html",
    "torch.dtype": "tensor_attributes.html",
    "torch.nn.Module": "generated/torch.nn.Module.html",
    "torch.nn.Sequential": "generated/torch.nn.Sequential.html",
    "torch.optim.Optimizer": "optim.html",
    "torch.optim.SGD": "generated/torch.optim.SGD.html",
}
INVENTORY = REPOSITORY / "build" / "torch.inv"
INVENTORY.parent.mkdir(exist_ok=True)
INVENTORY.write_bytes(
    b"# Sphinx inventory version 2\n# Project: PyTorch\n# Version: stable\n"
    b"# The remainder of this file is compressed using zlib.\n"
    + zlib.compress("".join(f"{name} py:class 1 {page}#$ -\n" for name, page in PYTORCH.items()).encode())
)
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", str(INVENTORY))}

# Pages of the repository that are shown here as well; links to its other Markdown files become text.
SHOWN = {"../CONTRIBUTING.md": "contribute.md", "../CHANGELOG.md": "changelog.md", "../SECURITY.md": "security.md"}


def with_values(
    _app: Sphinx, _what: str, _name: str, documented: Any, _options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Defaults are shown as they are written, `8 / 255`, but of a constant, `ALPHA`, the value."""
    module = sys.modules.get(getattr(documented, "__module__", None) or "")

    def value(match: re.Match[str]) -> str:
        found = getattr(module, match[1], None)
        return f"={found!r}" if isinstance(found, int | float | str | tuple) else match[0]

    return signature and re.sub(r"=([A-Z][A-Z0-9_]+)\b(?!\.)", value, signature), returned


def without_type(_app: Sphinx, what: str, _name: str, _documented: Any, _options: Any, lines: list[str]) -> None:
    """A colon in a property's first line ends no type: that is annotated. Napoleon looks for the first one only."""
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"


def setup(app: Sphinx) -> None:
    """On GitHub links lead to the files themselves; here to the pages that show them."""

    def lead(_app: Sphinx, page: str, source: list[str]) -> None:
        if "/" in page:  # whose .. is docs/
            return

        def inside(match: re.Match[str]) -> str:
            here = SHOWN.get(match["file"])
            return match["text"] if here is None else f"[{match['text']}]({here}{match['anchor']})"

        source[0] = re.sub(r"\[(?P<text>[^\]]*)\]\((?P<file>\.\./[\w/]+\.md)(?P<anchor>[^)]*)\)", inside, source[0])

    app.connect("source-read", lead)
    app.connect("autodoc-process-signature", with_values)
    app.connect("autodoc-process-docstring", without_type, priority=400)  # before Napoleon

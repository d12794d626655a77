"""How Sphinx makes the site: ``make docs``."""

import re
from pathlib import Path

from pyroflows import __version__

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "pyroflows"
author = "The pyroflows developers"
copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

# Pages in markdown, tutorials as they were executed.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"exclude-members": "extra_repr"}
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Every reference must lead somewhere, but for names of other projects, whose pages an offline
# build cannot look up, and for what stands in annotations alone: private and type-only names.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|pyro|numpy|np|arviz|matplotlib|nn|dist|constraints|poutine)(\..*)?"),
    (r"py:.*", r"(collections\.abc|typing|pathlib|os|types|pickle)\..*"),
    (r"py:.*", r"Tensor|Size|Module|Distribution|Axes|Path|Trace|ELBO|Fabric|dtype|device|ndarray"),
    (r"py:.*", r"(Fit)?Recipe|~P|pyroflows\.flows\.assembly\.B"),  # typed for editors alone
    (r"py:.*", r"Categorical|LogisticMixture|pyroflows\.datasets\.split\.AnySplit"),
    (r"py:.*", r"(pyroflows\.infer\.importance\.)?Moved"),
    (r"py:.*", r"Program|FreeSite|(pyroflows\.programs\.sites\.)?Setup|.*MixtureFlow"),
]

# Looks.
html_theme = "furo"
html_title = f"pyroflows {release}"
html_static_path = ["_static"]
html_css_files = ["pyroflows.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def bring_tutorials() -> None:
    """Copy the executed notebooks here.

    Their links to the repository's files get one folder longer; a link to a notebook that is not
    there becomes its words.
    """
    folder = HERE / "tutorials"
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for notebook in sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        for words, target in re.findall(r"\[([^][]+)\]\(([^()/]+\.ipynb)\)", text):
            if not (notebook.parent / target).exists():
                text = text.replace(f"[{words}]({target})", words)
        text = re.sub(r"\]\(\.\./", "](../../", text)
        (folder / notebook.name).write_text(text, encoding="utf-8")


bring_tutorials()

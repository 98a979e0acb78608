"""
How Sphinx builds the documentation.
"""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for what its tests know of themselves

project = "connlimit"
author = "the connlimit authors"
copyright = "2026, the connlimit authors"
version = release = installed_version("connlimit")

extensions = ["sphinx.ext.autodoc", "generated"]
html_theme = "furo"
default_role = "code"
exclude_patterns = ["_build", "_extensions", "figures"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
nitpicky = False

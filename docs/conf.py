"""Sphinx's settings. `make docs` builds the site without the internet; every warning is an error."""

from classer import __version__

project = "Classer"
author = "The Classer authors"
copyright = "The Classer authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
smartquotes = False  # an option's `--` stays as it is typed
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# The Python API: types stand in the signature's place, once.
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = "Classer"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["classer.css"]
html_theme_options = {"navigation_with_keys": True}

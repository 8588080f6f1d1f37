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

# The Python API. A single back-tick is code, as in Markdown.
default_role = "code"
add_module_names = False
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "Classer"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["classer.css"]
html_theme_options = {"navigation_with_keys": True}

"""`python -m classer.tools.cli` runs the command `classer`."""

import sys

from .main import main

sys.exit(main())

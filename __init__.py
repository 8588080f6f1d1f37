"""Classer: self-hosted text classification.

- `load`: a trained bundle in this process; see `LocalModel`.
- `ClasserClassifier`: training and classification as a scikit-learn estimator.
- `Client`, `AsyncClient`: the same questions to a Classer server.
- `ClasserError`, `InputError`: what all of these raise.

Importing this package loads none of them. Each is imported when it is first used, with what it needs: `Client` needs
neither JAX nor TensorFlow.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.errors import ClasserError as ClasserError
    from .data.errors import InputError as InputError
    from .serve.client.client import AsyncClient as AsyncClient
    from .serve.client.client import Client as Client
    from .serve.client.local import LocalModel as LocalModel
    from .serve.client.local import load as load
    from .tools.estimator import ClasserClassifier as ClasserClassifier

__version__ = "0.1.0"

__all__ = ["AsyncClient", "ClasserClassifier", "ClasserError", "Client", "InputError", "LocalModel", "load"]

# public name → (the module that defines it, the extra of the distribution that brings what it imports)
_PUBLIC = {
    "AsyncClient": ("serve.client.client", ""),
    "ClasserClassifier": ("tools.estimator", "train"),
    "ClasserError": ("data.errors", ""),
    "Client": ("serve.client.client", ""),
    "InputError": ("data.errors", ""),
    "LocalModel": ("serve.client.local", "local"),
    "load": ("serve.client.local", "local"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used.

    Raises:
      InputError: a package that it needs is not installed; the sentence has the command that installs it.
    """
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _PUBLIC[name]
    try:
        value = getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __name__):
            raise
        from .data.extras import missing_packages

        raise missing_packages(f"{__name__}.{name}", package, *filter(None, [extra])) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_the_other_classer() -> None:
    """Warns where the distribution `classer`, another product that installs a package of this name, is there too.

    Only the names in the folders of `sys.path` are read, because importlib.metadata takes longer to import than this
    package.
    """
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:  # a zip file, or no longer there
            continue
        for name in names:
            if name.startswith("classer-") and re.fullmatch(r"classer-[^-]+(-py[\d.]+)?\.(dist|egg)-info", name):
                warnings.warn(
                    f"Another product, the distribution `classer`, is installed in {folder or '.'} beside "
                    "classer-turbine, and both provide a package named `classer`; uninstall one of them "
                    "(`pip uninstall classer`) and reinstall the other, because either may have overwritten files.",
                    stacklevel=2,
                )
                return


_warn_of_the_other_classer()

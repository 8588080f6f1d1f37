"""How the server logs a failure: where it came from, never what a user sent."""

from __future__ import annotations

import logging
import traceback

logger = logging.getLogger("classer.serve")


def log_failure(what: str, error: BaseException) -> None:
    """Logs an error's type and frames, but not its message: that may hold a text."""
    logger.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))

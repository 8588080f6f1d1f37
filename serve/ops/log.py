"""The server's logs: failures and calls. They never hold texts or keys."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, Literal

logger = logging.getLogger("classer.serve")
# One line a call, and one for each change of the server's models. Loggers of their own, so that each can be redirected.
access_logger = logging.getLogger("classer.access")
audit_logger = logging.getLogger("classer.audit")

LogFormat = Literal["text", "json"]


def log_failure(what: str, error: BaseException) -> None:
    """Logs an error's type and frames, but not its message, which may hold a text."""
    logger.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


def log_fields(to: logging.Logger, message: str, **fields: Any) -> None:
    """Logs a message with fields; in the JSON format each is a field of the object."""
    to.info(message, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """One readable line: time, level, logger, message, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{stamp} {record.levelname.lower()} {record.name}: {record.getMessage()}{fields}"


def configure_logging(kind: LogFormat, *, access: bool) -> None:
    """Sends the server's log to stderr, one line a record.

    Args:
      kind: the format of a line.
      access: whether each call is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    root = logging.getLogger("classer")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
    access_logger.disabled = not access

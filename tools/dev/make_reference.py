"""Writes the generated pages of docs/ from the code that they describe.

    .venv/bin/python tools/dev/make_reference.py

The pages are committed, so that they can be read without a build; `tests/docs/test_reference.py` fails where one of
them differs from what this file writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PROTO = ROOT / "serve" / "proto" / "classifier.proto"

# Dataclasses on the page of the configuration, each as MODULE:CLASS, in the order of the page.
CONFIGURATION = (
    "train.config:TrainJob",
    "train.config:Recipe",
    "train.config:CurriculumStage",
    "train.teach:TeachJob",
    "train.convert:ConvertJob",
    "data.prepare.plan:PrepareConfig",
    "model.config:EncoderConfig",
    "serve.rpc.server:ServeConfig",
    "serve.rpc.frontend:FrontEndConfig",
    "serve.ops.operations:OperationsConfig",
    "serve.gateway.run:GatewayConfig",
)


def pages() -> dict[Path, str]:
    """The text of every generated page, by its path below docs/."""
    return {
        Path("reference/command-line.md"): command_line(),
        Path("reference/configuration.md"): configuration(),
        Path("reference/grpc.md"): grpc(),
        Path("reference/http.md"): http(),
        Path("reference/metrics.md"): metrics(),
        Path("internals/properties.md"): properties(),
    }


def _page(title: str, source: str, introduction: str, parts: Sequence[str]) -> str:
    note = f"<!-- Written by tools/dev/make_reference.py from {source}. Do not edit. -->"
    return "\n\n".join([note, f"# {title}", introduction, *parts]) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _prose(text: str) -> str:
    """Prose from the code as Markdown, with markup characters outside code spans escaped."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<>*_\[\]])", r"\\\1", part) for part in parts)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Option:
    """One row of a `--help`: an option or a positional argument.

    Attributes:
      group: the title of its box.
      name: its name with its metavar.
      default: its default; empty if there is none.
      text: its description.
    """

    group: str
    name: str
    default: str
    text: str


def help_of(*command: str) -> str:
    """The output of `classer COMMAND --help` on a terminal of 120 columns."""
    from classer.tools.cli.main import main

    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    terminal = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, terminal), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    printed.seek(0)
    return printed.read()


def commands() -> dict[str, str]:
    """The summary of each command of `classer --help`, by name, in its order."""
    return dict(re.findall(r"^  ([a-z][a-z-]*) +([A-Z].*)$", help_of(), flags=re.MULTILINE))


def subcommands(text: str) -> list[str]:
    """The names in a help's `{new,list,revoke}`."""
    usage = text.split("\n\n")[0]
    choices = re.search(r"\{([a-z][a-z,-]+)\}\s*$", usage)
    return choices.group(1).split(",") if choices else []


def summary(text: str) -> str:
    """The sentences between a help's usage and its first box."""
    return " ".join(text[text.index("\n\n") :].partition("╭")[0].split())


def options(text: str) -> Iterator[Option]:
    """The rows of the boxes of a help."""
    group, name, words = "", "", []
    for line in [*text.splitlines(), "╰"]:
        cells = re.fullmatch(r"│ (.*?) *│", line)
        continued = cells is not None and cells.group(1).startswith(" ")
        if name and not continued:
            yield _option(group, name, " ".join(words))
            name = ""
        if title := re.match(r"╭─ ([^─]+) ─", line):
            group = title.group(1)
        elif continued and cells:
            words.append(cells.group(1).strip())
        elif cells and re.match(r"-|\S.*?  +\S|[A-Z[{]\S*( \S+)?\]?$", cells.group(1)):
            name, _, rest = (part.strip() for part in cells.group(1).partition("  "))
            words = [rest] if rest else []


def _option(group: str, name: str, text: str) -> Option:
    default = ""
    if stated := re.search(r" ?\((required|default: ?(.*?)|repeatable)\)$", text):
        text = text[: stated.start()]
        default = "required" if stated.group(1) == "required" else (stated.group(2) or "")
    return Option(group, name.replace("{None}|", ""), "" if default == "None" else default, text)


def command_line() -> str:
    parts = [_table(("command", "what it does"), [(f"[`classer {name}`](#classer-{name})", text)
             for name, text in commands().items()])]  # fmt: skip
    for name in commands():
        text = help_of(name)
        parts += [f"## classer {name}", _prose(summary(text)), *_option_tables(text)]
        for sub in subcommands(text):
            of_sub = help_of(name, sub)
            parts += [f"### classer {name} {sub}", _prose(summary(of_sub)), *_option_tables(of_sub)]
    introduction = (
        "Each command prints the same with `--help`. A user's error is one sentence on standard error and exit code 2; "
        "see [errors](errors.md)."
    )
    return _page("Command line", "`--help` of every command", introduction, parts)


def _option_tables(text: str) -> list[str]:
    groups: dict[str, list[Option]] = {}
    for option in options(text):
        if not option.name.startswith("-h,"):
            groups.setdefault(option.group, []).append(option)
    tables = []
    for group, members in groups.items():
        if group not in ("options", "subcommands"):
            tables.append(f"*{group.capitalize()}*")
        if group == "subcommands":
            continue
        rows = [(f"`{o.name}`", f"`{o.default}`" if o.default not in ("", "required") else o.default, _prose(o.text))
                for o in members]  # fmt: skip
        tables.append(_table(("option", "default", "what it does"), rows))
    return tables


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────


def configuration() -> str:
    parts = []
    for place in CONFIGURATION:
        module, _, name = place.partition(":")
        kind = getattr(importlib.import_module(f"classer.{module}"), name)
        first = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]
        parts += [f"## {name}", f"`classer.{module}.{name}`", *([_prose(first)] if first else []), _fields(kind)]
    introduction = (
        "The dataclasses that commands and Python take their settings from. An option of a "
        "[command](command-line.md) is a field with `-` in place of `_`. A field out of its bounds raises "
        "`InputError`, which names it."
    )
    return _page("Configuration", "the docstrings of the dataclasses", introduction, parts)


def _fields(kind: type) -> str:
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        texts |= attributes_of(base.__doc__ or "")
    hints = typing.get_type_hints(kind)
    rows = []
    for field in dataclasses.fields(kind):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{field.default!r}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{_shown(field.default_factory)}`"
        default = re.sub(r"<.*?: '?(.*?)'?>", r"\1", default)  # an enum's member
        rows.append(
            (f"`{field.name}`", f"`{_type_name(hints[field.name])}`", default, _prose(texts.get(field.name, "")))
        )
    return _table(("field", "type", "default", "what it is"), rows)


def _shown(factory: Any) -> str:
    value = factory()
    return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:[a-z_]+\.)+", "", str(hint)).replace("NoneType", "None")


def attributes_of(doc: str) -> dict[str, str]:
    """The texts of a docstring's `Attributes:`, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(doc).partition("Attributes:\n")
    for line in section.splitlines():
        if not line.startswith(" "):
            break
        if start := re.match(r"  ([a-z_]+(?:, [a-z_]+)*): (.*)", line):
            names = start.group(1).split(", ")
            found |= dict.fromkeys(names, start.group(2))
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


# ── gRPC ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def grpc() -> str:
    """The services, messages and enums of the .proto, each with its comment."""
    text = PROTO.read_text(encoding="utf-8")
    head = _comment(text.partition("\nsyntax")[0].splitlines())
    parts: list[str] = []
    comment: list[str] = []
    rows: list[tuple[str, ...]] = []
    block = ""
    for line in text.partition("\npackage")[2].splitlines():
        stripped = line.strip()
        if stripped.startswith("//"):
            comment.append(stripped)
            continue
        if start := re.match(r"(service|message|enum) (\w+) \{(\}?)", stripped):
            block = start.group(1)
            parts += [f"## {start.group(2)}", *([_comment(comment)] if comment else [])]
            if start.group(3):
                parts.append("No fields.")
        elif rpc := re.match(r"rpc (\w+)\((.*)\) returns \((.*)\)", stripped):
            called = " → ".join(_message(side) for side in rpc.groups()[1:])
            parts += [f"### {rpc.group(1)}", f"{called}", _comment(comment)]
        elif field := re.match(r"(?:(optional|repeated) )?([\w.]+) (\w+) = (\d+)(?: \[.*\])?;", stripped):
            label, kind, name, number = field.groups()
            rows.append((f"`{name}`", f"{label or ''} {_message(kind)}".strip(), number, _comment(comment)))
        elif value := re.match(r"(\w+) = (\d+);", stripped):
            rows.append((f"`{value.group(1)}`", value.group(2), _comment(comment)))
        elif line.startswith("}") and rows:
            header = ("value", "number", "meaning") if block == "enum" else ("field", "type", "number", "meaning")
            parts.append(_table(header, rows))
            rows = []
        comment = []
    introduction = f"{head}\n\nThe package is `classer.v1`; the file is `serve/proto/classifier.proto`."
    return _page("gRPC", "the comments of serve/proto/classifier.proto", introduction, parts)


def _comment(lines: Sequence[str]) -> str:
    """Comment lines as Markdown paragraphs; indented ones, a table of codes, as a list."""
    paragraphs: list[str] = []
    new = True
    for line in (line.strip().removeprefix("//").removeprefix(" ") for line in lines):
        if code := re.match(r"  ([A-Z_]+)  +(.*)", line):
            paragraphs.append(f"- `{code.group(1)}`: {_prose(code.group(2))}")
        elif not line.strip() or "make proto" in line:
            new = True
            continue
        elif new:
            paragraphs.append(_prose(line))
        else:
            paragraphs[-1] += " " + _prose(line)
        new = False
    return "\n\n".join(paragraphs)


def _message(name: str) -> str:
    stream, _, kind = name.rpartition(" ")
    own = re.search(rf"^(?:message|enum) {re.escape(kind)}\b", PROTO.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return f"{stream} ".lstrip() + (f"[`{kind}`](#{kind.lower()})" if own else f"`{kind}`")


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def http() -> str:
    """The paths and bodies of the gateway, from its OpenAPI description."""
    from classer.serve.gateway.app import make_app

    described = make_app("localhost:50051").openapi()
    parts = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts += [f"## {method.upper()} {path}", _prose(operation.get("description") or operation["summary"])]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                parts.append(f"Body: {_schema(body)}.")
            answers = operation["responses"]
            schema = answers["200"].get("content", {}).get("application/json", {}).get("schema")
            if schema:
                parts.append(f"Answer: {_schema(schema)}.")
            failures = [status for status in sorted(answers) if "Failure" in str(answers[status].get("content"))]
            if failures:
                parts.append(f"Other statuses: {', '.join(failures)}, with a [`Failure`](#failure).")
    for name, schema in sorted(described.get("components", {}).get("schemas", {}).items()):
        needed = schema.get("required", ())
        rows = [
            (f"`{field}`", _schema(value), "yes" if field in needed else "", _prose(value.get("description", "")))
            for field, value in schema.get("properties", {}).items()
        ]
        parts += [f"## {name}", *([_prose(schema["description"])] if "description" in schema else [])]
        parts.append(_table(("field", "type", "required", "meaning"), rows) if rows else "No fields.")
    introduction = (
        "What [`classer gateway`](command-line.md#classer-gateway) answers. A running gateway has the same at "
        "`/openapi.json`. [Errors](errors.md#grpc-and-http) has the status of each error."
    )
    return _page("HTTP", "the gateway's OpenAPI description", introduction, parts)


def _schema(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_schema(one) for one in schema[union])
    if schema.get("type") == "array":
        return f"list of {_schema(schema.get('items', {}))}"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    words = {"minimum": "at least {:,.10g}", "maximum": "at most {:,.10g}", "maxLength": "up to {:,} characters"}
    bounds = ", ".join(sentence.format(schema[key]) for key, sentence in words.items() if key in schema)
    return f"`{schema.get('type', 'any')}` {bounds}".strip()


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def metrics() -> str:
    from classer.serve.ops.metrics import CallMetrics, DeviceMetrics, new_registry

    parts = []
    of_device = {"waiting_tokens": lambda: 0, "max_waiting_tokens": 0, "alive": lambda: True}
    for title, make in (
        ("Calls", CallMetrics),
        ("Device", lambda registry: DeviceMetrics(registry, **of_device)),
    ):
        registry = new_registry()
        make(registry)
        rows = []
        collectors: list[Any] = list(registry._collector_to_names)
        for collector in collectors:
            if not hasattr(collector, "describe"):  # the figures of the process, which are Prometheus' own
                continue
            family = next(iter(collector.describe()))
            suffix = "_total" if family.type == "counter" else ""
            labels = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
            rows.append((f"`{family.name}{suffix}`", family.type, labels, _prose(family.documentation)))
        parts += [f"## {title}", _table(("metric", "type", "labels", "meaning"), sorted(rows))]
    introduction = (
        "`classer serve`, `classer frontend` and `classer gateway` answer Prometheus at `/metrics`, on the port of "
        "`--metrics-port` (the gateway on its own port). A server has both tables, a front end and a gateway "
        "the first.\n\n"
        "Memory, CPU time and open files of the process come with them, under Prometheus' own names. "
        "[Operate](../guide/operate.md#metrics) says which to act on."
    )
    return _page("Metrics", "serve/ops/metrics.py", introduction, parts)


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────


def properties() -> str:
    from classer.tools.dev.break_properties import BREAKS

    rows = [(one.name, f"`{one.file}`", f"`{one.tests}`") for one in BREAKS]
    introduction = (
        "Each property below is broken on purpose, by changing one line in a copy of the checkout; tests of its room "
        "must then fail. A break that no test notices ends the command with exit code 1:\n\n"
        "```bash\n.venv/bin/python tools/dev/break_properties.py            # all of them\n"
        ".venv/bin/python tools/dev/break_properties.py leaves     # those with this word in their name\n```"
    )
    table = _table(("property", "the line is in", "tests that are run"), rows)
    return _page("Properties", "tools/dev/break_properties.py", introduction, [table])


def main() -> int:
    for path, text in pages().items():
        (DOCS / path).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")
        print(f"docs/{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

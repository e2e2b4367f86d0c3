"""Pages that are made anew at every build, into `generated/`, which git ignores: one a command, one a JSON Schema.

Commands are read from the tree that typer builds and from the signatures of their functions, schemas from `schemas/`: nothing is
written twice, and a new command or field has its page at the next build.
"""

import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from sphinx.application import Sphinx

from vitq.cli.app import app as vitq
from vitq.whole import write_whole

HERE = Path(__file__).parent
READ_ON = {
    "profile": ("metrics", "papers"),
    "allocate": ("concepts", "papers"),
    "calibrate": ("recipes",),
    "export": ("deploying", "models"),
    "evaluate": ("concepts",),
    "bench": ("deploying", "faq"),
    "doctor": ("deploying",),
    "demo": ("start",),
    "show": ("formats",),
}
"""Where a command's page sends its reader."""


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls: writes the pages before it looks for them."""
    app.connect("builder-inited", lambda _: write_pages(HERE / "generated"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(folder: Path) -> None:
    """Writes all pages into a folder; one that is as it was is left alone, and one that nothing makes any more is removed."""
    pages = {f"commands/{name}.md": text for name, text in command_pages().items()} | {
        f"schemas/{path.stem}.md": schema_page(path) for path in sorted((HERE / "schemas").glob("*.json"))
    }
    for stale in set(folder.rglob("*.md")) - {folder / name for name in pages}:
        stale.unlink(missing_ok=True)
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_whole(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))  # another build may be reading


def command_pages() -> dict[str, str]:
    """The page of each command by its name, and `index`, which lists them."""
    group: Any = typer.main.get_command(vitq)
    commands = {name: command for name, command in group.commands.items() if not command.hidden}
    rows = [f"| [`vitq {name}`]({name}.md) | {_escaped(_first_line(command.help))} |" for name, command in commands.items()]
    toctree = ["```{toctree}", ":hidden:", *commands, "```"]
    lines = ["# Commands", "", *_paragraphs(group.help), "", *toctree, "", "| command | |", "| --- | --- |", *rows, ""]
    lines += ["What `vitq COMMAND --help` prints, a page a command. Exit codes are on the page of [files](../../formats.md).", ""]
    return {"index": "\n".join(lines)} | {name: command_page(name, command) for name, command in commands.items()}


def command_page(name: str, command: Any) -> str:
    """One command: what it does, its arguments and its options, hidden ones left out."""
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter.param_type_name == "option"]
    types_ = {key: value.annotation for key, value in inspect.signature(command.callback).parameters.items()}
    usage = " ".join(["vitq", name, *(_argument(parameter) for parameter in arguments), "[OPTIONS]"])
    lines = [f"# `vitq {name}`", "", *_paragraphs(command.help), "", "```text", usage, "```", ""]
    if arguments:
        lines += ["## Arguments", "", *_entries((_argument(parameter), parameter.help) for parameter in arguments)]
    lines += ["## Options", "", *_entries((_option(parameter, types_), _meaning(parameter)) for parameter in options)]
    if name in READ_ON:
        links = ", ".join(f"[](../../{page}.md)" for page in READ_ON[name])
        lines += [f"Read on: {links}.", ""]
    return "\n".join(lines)


def schema_page(path: Path) -> str:
    """One JSON Schema: a table of fields for it and for each record that it is made of."""
    schema = json.loads(path.read_text(encoding="utf-8"))
    records = {schema["title"]: schema} | {name: found for name, found in schema.get("$defs", {}).items() if "properties" in found}
    lines = [f"# `{path.name}`", "", f"The schema itself: {{download}}`{path.name} <../../schemas/{path.name}>`.", ""]
    for name, record in records.items():
        lines += [f"## {name}", "", *_paragraphs(record.get("description", "")), "", "| field | value |", "| --- | --- |"]
        required = record.get("required", [])
        for field, entry in record["properties"].items():
            default = f", {json.dumps(entry['default'])} where left out" if "default" in entry else ", may be left out"
            lines.append(f"| `{field}` | {_kind(entry)}{'' if field in required or 'const' in entry else default} |")
        lines.append("")
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    shown = parameter.metavar or parameter.name.upper()
    return shown if parameter.required or shown.startswith("[") else f"[{shown}]"


def _option(parameter: Any, annotations: dict[str, Any]) -> str:
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    value = parameter.metavar or _value(annotations.get(parameter.name))
    return f"{names} {value}".strip()


def _value(annotation: Any) -> str:
    """What stands for an option's value: nothing for a switch."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is list:
        return _value(get_args(annotation)[0])
    return {bool: "", int: "N", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _meaning(parameter: Any) -> str:
    """The help text, and the default where it is a plain value that the text does not give already."""
    default = parameter.default
    if default is None or isinstance(default, bool) or callable(default) or "(default:" in (parameter.help or ""):
        return parameter.help or ""
    return f"{parameter.help or ''} (default: {default})".strip()


def _entries(pairs: Iterable[tuple[str, str | None]]) -> Iterator[str]:
    for term, meaning in pairs:
        yield from (f"`{term}`", f": {_escaped(meaning or '')}", "")


def _kind(entry: dict[str, Any]) -> str:
    """The values that a field takes: words for plain ones, brackets and braces as in JSON."""
    if "$ref" in entry:
        name = entry["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in entry:
        return " or ".join(_kind(part) for part in entry["anyOf"])
    if "const" in entry:
        return f"`{json.dumps(entry['const'])}`"
    if "enum" in entry:
        values = entry["enum"]
        numbers = values == list(range(values[0], values[0] + len(values))) if isinstance(values[0], int) else False
        return f"{values[0]} to {values[-1]}" if numbers else " or ".join(f"`{json.dumps(value)}`" for value in values)
    if entry.get("type") == "array":
        parts = [_kind(part) for part in entry["prefixItems"]] if "prefixItems" in entry else [_kind(entry["items"]), "..."]
        return f"\\[{', '.join(parts)}\\]"
    if entry.get("type") == "object":
        values = entry.get("additionalProperties")
        return f"{{name: {_kind(values)}, ...}}" if isinstance(values, dict) else "object"
    words = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    return words.get(entry.get("type", "anything"), entry.get("type", "anything"))


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _paragraphs(text: str | None) -> list[str]:
    return [_escaped(line) for line in inspect.cleandoc(text or "").split("\n")]


def _escaped(text: str) -> str:
    """Plain text as Markdown: what is between backticks stays, options get some, and other signs mean themselves."""
    parts = re.split(r"(`[^`]*`|(?<![\w-])--[a-z][a-z-]*)", text)
    return "".join(_as_code(part) if part.startswith(("`", "--")) else re.sub(r"([\\*_<>\[\]|#])", r"\\\1", part) for part in parts)


def _as_code(part: str) -> str:
    return part if part.startswith("`") else f"`{part}`"

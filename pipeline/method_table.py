"""The tables of `refinery methods`: summaries, settings with defaults and meaning.

All of it is read from the source files: importing the methods would take seconds, for torch.
"""

import ast
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from models.inversion.registry import METHODS


def method_table() -> Group:
    """Every method of the registry."""
    parts: list[Text | Table] = []
    for name in sorted(METHODS):
        module, _, attribute = METHODS[name].partition(":")
        found = {name: (where, value) for where, name, value, _ in _assigned(module, attribute)}
        is_later = "needs_init" in found and _literal(found["needs_init"][1]) is True
        note = " (refines the result of an earlier method)" if is_later else ""
        summary = f"  {_literal(found['summary'][1])}{note}"
        parts.append(Text.assemble((name, "bold cyan"), summary))
        table = Table(box=None, padding=(0, 1, 0, 2), show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        where, config = found["Config"]
        settings: dict[str, tuple[ast.expr, str]] = {}
        for _, key, value, doc in _assigned(where, _name(config)):
            settings[key] = value, doc or settings.get(key, (value, ""))[1]
        for key, (value, doc) in settings.items():
            table.add_row(Text(f"{key} = {_default(value)}"), Text(doc))
        parts += [table, Text("")]
    return Group(*parts)


def field_docs(cls: type) -> dict[str, str]:
    """The strings under the fields of a dataclass, one line each; inherited ones count."""
    fields = _assigned(cls.__module__, cls.__qualname__)
    return {name: doc for _, name, _, doc in fields if doc}


def _assigned(module: str, name: str) -> Iterator[tuple[str, str, ast.expr, str]]:
    """Module, name, value and doc of what a class and those above it assign, topmost first."""
    place = _find(module, name)
    if place is None:
        return
    module, node = place
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _assigned(module, base.id)
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        target = None
        if isinstance(statement, ast.AnnAssign):
            target = statement.target
        elif isinstance(statement, ast.Assign):
            target = statement.targets[0]
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and value and not target.id.startswith("_"):
            text = after.value if isinstance(after, ast.Expr) else None
            doc = str(_literal(text)) if isinstance(text, ast.Constant) else ""
            yield module, target.id, value, " ".join(doc.split())


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Where a class that a module has or imports is written."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _find(node.module or "", name) if (node.module or "")[:6] == "models" else None
    return None


@lru_cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def _literal(value: ast.expr) -> object:
    return ast.literal_eval(value)


def _default(value: ast.expr) -> str:
    """Of a field, as Python would print it."""
    if isinstance(value, ast.Call):
        of = {word.arg: word.value for word in value.keywords}
        if "default" not in of:
            return {"list": "[]", "dict": "{}"}[_name(of["default_factory"])]
        value = of["default"]
    try:
        return repr(_literal(value))
    except ValueError:  # a name
        return ast.unparse(value)


def _name(value: ast.expr) -> str:
    assert isinstance(value, ast.Name)
    return value.id

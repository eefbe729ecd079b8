"""The tables of `refinery methods`: summaries, settings with defaults and meaning."""

import ast
import dataclasses
import inspect
import textwrap

from rich.console import Group
from rich.table import Table
from rich.text import Text

from models.inversion.registry import METHODS, method_class


def method_table() -> Group:
    """Every method of the registry."""
    parts: list[Text | Table] = []
    for name in sorted(METHODS):
        cls = method_class(name)
        note = " (refines the result of an earlier method)" if cls.needs_init else ""
        parts.append(Text.assemble((name, "bold cyan"), f"  {cls.summary}{note}"))
        table = Table(box=None, padding=(0, 1, 0, 2), show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        docs = field_docs(cls.Config)
        for field in dataclasses.fields(cls.Config):
            setting = f"{field.name} = {_default(field)!r}"
            table.add_row(Text(setting), Text(docs.get(field.name, "")))
        parts += [table, Text("")]
    return Group(*parts)


def field_docs(cls: type) -> dict[str, str]:
    """The strings under the fields of a dataclass, one line each; inherited ones count."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        value = after.value if isinstance(after, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docs[node.target.id] = " ".join(value.value.split())
    return docs


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default

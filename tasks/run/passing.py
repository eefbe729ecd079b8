"""Which columns a statement only passes on to its answer.

Codes and pictures are large, and most questions choose few rows by small columns. A column that
stands in the outermost SELECT list as it is, and nowhere else, is fetched for the rows of the
answer after they are known. Here a statement's syntax tree is read for that; whatever is not
plainly of this form is computed by DuckDB over the parts, with the same answer.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

Node = Any
"""A value of DuckDB's JSON form of a statement."""


def used_columns(tree: Node, columns: Collection[str]) -> set[str] | None:
    """The columns that the statement does more with than pass them on.

    Args:
        tree: of `json_serialize_sql`, one SELECT.
        columns: names of the large columns.

    Returns:
        Some of `columns`; None where it cannot be told, so that all must count as used.
    """
    select = tree["node"]
    if select["type"] != "SELECT_NODE" or not _is_plain(select):
        return None
    inner: list[Node] = [{k: v for k, v in select.items() if k != "select_list"}]
    passed: dict[str, str] = {}
    for item in select["select_list"]:
        name = _passed_on(item, columns)
        if name is not None:
            passed[item["alias"] or name] = name
        elif item["type"] == "STAR" and not item["columns"] and not item["rename_list"]:
            inner.append(item["replace_list"])
        else:
            inner.append(item)
    nodes = [node for part in inner for node in _nodes(part)]
    if any(map(_hides_columns, nodes)):
        return None
    tables = [node for node in nodes if "sample" in node]
    whole_rows = {n.get(key, "").lower() for n in tables for key in ("alias", "table_name")} - {""}
    names = {name.lower() for node in nodes for name in _names(node)}
    ends = {n["column_names"][-1].lower() for n in nodes if n.get("type") == "COLUMN_REF"}
    if ends & whole_rows:  # SELECT t FROM latents t: a row as one value
        return None
    used = {name for name in columns if name.lower() in names}
    return used | {name for alias, name in passed.items() if alias.lower() in names}


def named_tables(tree: Node) -> set[str] | None:
    """Tables and views that a statement names, in lower case; None where a function may name more.

    Args:
        tree: as of `used_columns`.
    """
    nodes = list(_nodes(tree))
    if any(node.get("type") == "TABLE_FUNCTION" for node in nodes):
        return None
    return {node["table_name"].lower() for node in nodes if "table_name" in node}


def _names(node: Mapping[str, Node]) -> Iterator[str]:
    """Names of columns that a node uses."""
    yield from node.get("column_names", ()) if node.get("type") == "COLUMN_REF" else ()
    yield from node.get("using_columns", ())


def _passed_on(item: Node, columns: Collection[str]) -> str | None:
    if item["type"] != "COLUMN_REF":
        return None
    *before, last = [name.lower() for name in item["column_names"]]
    found = {name.lower(): name for name in columns}
    return found.get(last) if not found.keys() & set(before) else None


def _is_plain(select: Node) -> bool:
    """No DISTINCT, no GROUP BY ALL, no ORDER BY a number or everything."""
    if select["aggregate_handling"] != "STANDARD_HANDLING":
        return False
    for modifier in select["modifiers"]:
        if modifier["type"] == "DISTINCT_MODIFIER":
            return False
        orders = modifier.get("orders", ())
        if any(o["expression"]["type"] in ("STAR", "VALUE_CONSTANT") for o in orders):
            return False
    return not any(group["type"] == "VALUE_CONSTANT" for group in select["group_expressions"])


def _hides_columns(node: Mapping[str, Node]) -> bool:
    """What compares or renames columns without naming them, and statements about a view."""
    kinds = (
        "STAR",
        "SET_OPERATION_NODE",
        "SHOW_REF",
        "PIVOT",
        "TABLE_FUNCTION",
        "DISTINCT_MODIFIER",
    )
    return (
        node.get("ref_type") == "NATURAL"
        or node.get("type") in kinds
        or bool(node.get("column_name_alias"))
    )


def _nodes(value: Node) -> Iterator[Mapping[str, Node]]:
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from _nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from _nodes(child)

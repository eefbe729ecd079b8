"""Addresses of the browser: what a query string asks for, and links that ask for it.

Everything a run says (its name, keys, columns) travels as a parameter, never as a part of a path.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from models.errors import ConfigError
from tasks.browse.table import Cursor, Wish

Parameters = Mapping[str, Sequence[str]]
"""Values by name, as a query string or a form has them."""


def first(parameters: Parameters, name: str, default: str = "") -> str:
    """The first value of a parameter."""
    return next(iter(parameters.get(name, ())), default)


def link(path: str, **parameters: Any) -> str:
    """A local address; parameters without a value are left out."""
    pairs = [(k, v) for k, v in parameters.items() if v not in ("", None, (), [])]
    return f"{path}?{urlencode(pairs, doseq=True)}" if pairs else path


def wish_of(parameters: Parameters, metrics: Sequence[str]) -> Wish:
    """The rows that a grid's address asks for.

    Raises:
        ConfigError: a bound is no number, or the status is none.
    """
    status = first(parameters, "status")
    if status not in ("", "ok", "failed"):
        raise ConfigError(f"status: expected ok, failed or nothing, found {status!r}")
    ranges = {}
    for name in metrics:
        pair = _number(parameters, f"min.{name}"), _number(parameters, f"max.{name}")
        if pair != (None, None):
            ranges[name] = pair
    sort = first(parameters, "sort", "sample_key")
    return Wish(
        status=status,
        text=first(parameters, "q"),
        ranges=ranges,
        where=first(parameters, "where"),
        sort=sort,
        is_descending=first(parameters, "order") == "desc",
        cursor=_cursor(parameters, sort in metrics),
    )


def wished(parameters: Parameters) -> dict[str, list[str]]:
    """The parameters of a grid's address without those of its page."""
    page = ("at", "value", "key", "back")
    return {k: list(v) for k, v in parameters.items() if k not in page and any(v)}


def page_link(parameters: Parameters, cursor: Cursor | None, at: int) -> str | None:
    """The address of another page of the same grid; None where there is none."""
    if cursor is None:
        return None
    where = {"value": cursor.value, "key": cursor.key, "at": at, "back": int(cursor.is_back) or ""}
    return link("/grid", **wished(parameters), **where)


def _cursor(parameters: Parameters, is_number: bool) -> Cursor | None:
    key, value = first(parameters, "key"), first(parameters, "value")
    if "key" not in parameters:
        return None
    found: float | str | None = value or None
    if is_number and value:
        found = _number(parameters, "value")
    return Cursor(value=found, key=key, is_back=bool(first(parameters, "back")))


def _number(parameters: Parameters, name: str) -> float | None:
    text = first(parameters, name).strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}: expected a number, found {text!r}") from error

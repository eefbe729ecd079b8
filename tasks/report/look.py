"""One look for the report and for `refinery browse`: templates, style sheet, and their words.

Templates escape every value they are given; only what this module makes is markup.
"""

import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks.job import INPUTS
from tasks.report.pictures import data_uri
from tasks.report.words import counted, duration, number, when

CSS = (files("tasks.report") / "static/style.css").read_text()


@cache
def environment(*packages: str) -> Environment:
    """Templates of this room, and before them those of other packages' folders `templates`."""
    loader = ChoiceLoader([PackageLoader(name) for name in (*packages, "tasks.report")])
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (number, counted, duration, when, breakable, short, data_uri)
    made.filters.update({function.__name__: function for function in words})
    made.globals["titles"] = TITLES
    return made


TITLES = dict.fromkeys(INPUTS, "original")
"""What people call the columns of pictures; the others go by their names."""


def section(name: str, *values: Any) -> Markup:
    """A section of the report: a macro of `sections.html`."""
    return macro("sections.html", name, *values)


def macro(template: str, name: str, *values: Any) -> Markup:
    """What a macro of one of this room's templates makes of the values."""
    made = environment().get_template(template).module
    return Markup(getattr(made, name)(*values))


def short(key: str) -> str:
    """The last part of a key: in a narrow place its beginning, which many share, says little."""
    return re.split(r"[/:]", key.rstrip("/:"))[-1] or key


def breakable(text: str) -> Markup:
    """A name that may break after its separators, and a hash after every eighth digit: nowhere
    inside a word."""
    if re.fullmatch(r"[0-9a-f]{32,}", text):
        pieces = re.findall(r".{1,8}", text)
    else:
        pieces = re.findall(r"[^/_.:\-]+[/_.:\-]*|[/_.:\-]+", text)
    return Markup("<wbr>").join(escape(piece) for piece in pieces)

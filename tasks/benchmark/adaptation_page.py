"""The adaptation benchmark's result as Markdown."""

from collections.abc import Mapping
from typing import Any

from tasks.benchmark.edits import markdown as edits_markdown

HEADS: tuple[tuple[str, str, str], ...] = (
    ("frechet_trunk", "Frechet, trunk ↓", "{:.2f}"),
    ("frechet_squeezenet", "Frechet, SqueezeNet ↓", "{:.2f}"),
    ("content_trunk", "content, trunk ↑", "{:.2f}"),
    ("content_squeezenet", "content, SqueezeNet ↑", "{:.2f}"),
    ("diversity_trunk", "diversity, trunk", "{:.2f}"),
    ("diversity_squeezenet", "diversity, SqueezeNet", "{:.2f}"),
    ("colour_share", "colour map", "{:.0%}"),
    ("identity", "identity ↑", "{:.2f}"),
    ("seconds", "seconds", "{:.0f}"),
    ("kilobytes", "kB", "{:.0f}"),
)
GOALS = (("frechet", 0.6, -1), ("content", 0.8, 1), ("diversity", 0.7, 1))
"""Wanted of a domain from ten pictures: at most, or at least."""
SHIPPED_GOALS = (("colour_share", 0.35, -1), ("frechet_squeezenet", 0.6, -1), ("identity", 0.6, 1))
"""Wanted of every bundled domain."""
TIME_GOAL, RENDERING_GOAL, KILOBYTES_GOAL, MONOTONE_GOAL = 1.6, 0.9, 300, 90
LEGEND = """\
{codes} codes (truncation 0.7) rendered in every domain. Frechet: distance to the held-out
portraits of the style ({held_out}) over the same of the unadapted generator. Content: correlation
of all pairwise picture similarities with the source's. Diversity: mean distance of two pictures
over the source's. "trunk" is our own perceptual trunk, whose activations the losses of a set of
pictures see too; "SqueezeNet" (v1.1, ImageNet, the activations of its seventh module) no loss
sees. Each over the mean of places. Colour map: share of the squared change of all pixels that one
quadratic map of colours explains; 100 % is a regrade. Identity: mean similarity of a person before
and after. All without noise inputs;{steps} seconds on one thread, file in half precision
(all weights: one byte each). "Training portraits" are the style's other pictures themselves: what
the few held-out pictures leave of a perfect domain."""


def markdown(result: Mapping[str, Any]) -> str:
    """The whole page: head, table, goals, legend, and the edits' table where it was made."""
    machine = "; ".join(f"{k}: {v}" for k, v in result["machine"].items())
    head = [
        f"# {result['title']}",
        "",
        f"`{result['command']}`",
        "",
        f"Portraits of `{result['data']}`, generator `{result['generator']}`. {machine}.",
        "",
    ]
    legend = LEGEND.format(
        codes=result["codes"],
        steps=f" {result['steps']} steps," if result["rows"] else "",
        held_out=", ".join(f"{style} {n}" for style, n in result["held_out"].items()),
    )
    parts = [*head, *domain_table(result["rows"], result["training_portraits"]), ""]
    if result["shipped"]:
        parts += ["## Bundled domains", "", *domain_table(result["shipped"]), ""]
    if result["rows"]:
        parts += ["## Size against quality", "", *curve_table(result), ""]
    parts += ["## Goals", "", *goal_table(result), "", legend, ""]
    if "edits" in result:
        about = f"{result['edits']['pictures']} stored codes; changes in standard deviations."
        parts += ["## Edits", "", about, "", edits_markdown(result["edits"])]
    return "\n".join(parts)


def domain_table(
    rows: Mapping[str, Mapping[str, Any]], portraits: Mapping[str, Mapping[str, Any]] | None = None
) -> list[str]:
    """One line for each row, then the portraits themselves."""
    shown = {name: {**row, "kilobytes": row["bytes"] / 1000} for name, row in rows.items()}
    return _table(shown | {f"{k}: training portraits": v for k, v in (portraits or {}).items()})


def curve_table(result: Mapping[str, Any]) -> list[str]:
    """The forms of one style from ten pictures, the smallest file first."""
    name = _first(result)
    rows = {k: v for k, v in result["rows"].items() if k == name or k.startswith(f"{name}, ")}
    return domain_table(dict(sorted(rows.items(), key=lambda item: item[1]["bytes"])))


def _first(result: Mapping[str, Any]) -> str:
    wanted = "impasto, 10 pictures"
    return wanted if wanted in result["rows"] else next(iter(result["rows"]))


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    heads = [h for h in HEADS if any(row.get(h[0]) is not None for row in rows.values())]
    lines = [f"| domain | {' | '.join(h[1] for h in heads)} |", "|---|" + "---:|" * len(heads)]
    for name, row in rows.items():
        cells = [form.format(row[k]) if row.get(k) is not None else "" for k, _, form in heads]
        stopped = "" if row.get("status", "finished") == "finished" else f" ({row['status']})"
        lines.append(f"| {name}{stopped} | {' | '.join(cells)} |")
    return lines


def goal_table(result: Mapping[str, Any]) -> list[str]:
    """What was wanted, what was measured, met or not, by eye."""
    lines = ["| goal | wanted | measured | |", "|---|---|---|---|"]
    for domain, scores in result["shipped"].items():
        for name, bound, sign in SHIPPED_GOALS:
            if name in scores:
                title = f"{domain}, bundled: {name.replace('_', ' ')}"
                lines.append(_goal(title, scores[name], bound, sign))
    if result["rows"]:
        lines += _row_goals(result)
    for name, row in result.get("edits", {"rows": {}})["rows"].items():
        title = f"edit {name}: pictures with a monotone response over -3..3"
        lines.append(_goal(title, 100 * row["monotone"], MONOTONE_GOAL, 1, 1, " %"))
    return lines


def _row_goals(result: Mapping[str, Any]) -> list[str]:
    """Of the first style from ten pictures, of the sizes and of the times."""
    lines, first = [], _first(result)
    row = result["rows"][first]
    for eye in result["eyes"]:
        for name, bound, sign in GOALS:
            lines.append(_goal(f"{first}: {name}, {eye}", row[f"{name}_{eye}"], bound, sign))
    sizes = [r["bytes"] / 1000 for r in result["rows"].values() if r["form"] == "tokens"]
    lines.append(_goal("largest tokens", max(sizes), KILOBYTES_GOAL, -1, 0, " kB"))
    for timed in result["timing"]["steps"]:
        one, four = timed["codes"]
        title = f"a step with 4 domains of {four} codes over one of {one}"
        lines.append(_goal(title, timed["seconds"][1] / timed["seconds"][0], TIME_GOAL, -1))
    for batch, ratio in result["timing"]["rendering"].items():
        title = f"speed of rendering in a domain over plain, batch {batch}"
        lines.append(_goal(title, ratio, RENDERING_GOAL, 1))
    return lines


def _goal(
    title: str, value: float, bound: float, sign: int, digits: int = 2, unit: str = ""
) -> str:
    wanted = f"{'at least' if sign > 0 else 'at most'} {bound}{unit}"
    verdict = "met" if sign * value >= sign * bound else "**not met**"
    return f"| {title} | {wanted} | {value:.{digits}f}{unit} | {verdict} |"

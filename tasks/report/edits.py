"""What a run of edits shows: each sample's pictures in a row, and what the edits did on average."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.report.aggregates import Ask, pictures_of, stored_pictures
from tasks.report.look import section
from tasks.report.pictures import is_pixelated
from tasks.run.large import quoted

SAMPLES = 24
"""Rows of pictures; the samples are spread evenly over the run, in order of their keys."""
NOTES = {
    "age_change": "years, by the attribute scorer",
    "gender_change": "probability, by the attribute scorer",
    "smile_change": "probability, by the attribute scorer",
    "drift": "perceptual distance to the inversion",
    "identity": "cosine of face embeddings with the inversion",
    "nscd": "distance of the codes from the generator's own (LSAP)",
}


@dataclass(frozen=True, kw_only=True)
class VariantSummary:
    """One variant: what was asked for, and the mean of each of its metrics."""

    name: str
    asked: str
    means: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class EditData:
    """The edits of a run.

    Attributes:
        source: the run that was edited.
        columns: of the pictures: original and inversion where stored, then the variants.
        samples: key, and the encoded pictures by column.
    """

    source: str
    variants: tuple[VariantSummary, ...]
    columns: tuple[str, ...]
    samples: tuple[tuple[str, Mapping[str, bytes | None]], ...]


def gather_edits(
    ask: Ask | None, config: Mapping[str, Any], schemas: Mapping[str, pa.Schema]
) -> EditData:
    """Read what the page shows of the edits.

    Args:
        ask: None while nothing is committed.
        config: of run.json.
        schemas: of the views.
    """
    names = [variant["name"] for variant in config["variants"]]
    means: dict[str, dict[str, float]] = {name: {} for name in names}
    if ask is not None and "latents" in schemas:
        wanted = [f.name for f in schemas["latents"] if f.name.rpartition("@")[2] in means]
        if wanted:
            listed = ", ".join(f"avg({quoted(name)}) AS {quoted(name)}" for name in wanted)
            for name, value in ask(f"SELECT {listed} FROM latents").to_pylist()[0].items():
                metric, _, variant = name.rpartition("@")
                means[variant][metric] = float("nan") if value is None else value
    columns = (*stored_pictures(schemas), *names)
    return EditData(
        source=config["source"],
        variants=tuple(
            VariantSummary(name=v["name"], asked=_asked(v), means=means[v["name"]])
            for v in config["variants"]
        ),
        columns=columns,
        samples=_samples(ask, columns) if ask is not None and "images" in schemas else (),
    )


def _asked(variant: Mapping[str, Any]) -> str:
    """ "age +2, domain impasto 0.7, 0.5 of a.png"."""
    parts = [f"{_label(e['name'])} {e['strength']:+g}" for e in variant["edits"]]
    parts += [f"domain {_label(d['name'])} {d['strength']:g}" for d in variant["domains"]]
    for blend in variant["blends"]:
        rows = f" in rows {', '.join(map(str, blend['rows']))}" if blend["rows"] else ""
        parts.append(f"{blend['share']:g} of {blend['sample_key']}{rows}")
    if variant["assigned"]:
        parts.append(f"domains of {_label(variant['assigned'])}")
    if variant["residual"] != 1:
        parts.append(f"own residual {variant['residual']:g}")
    return ", ".join(parts) or "nothing"


def _label(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].removesuffix(".json")


def _samples(
    ask: Ask, columns: tuple[str, ...]
) -> tuple[tuple[str, Mapping[str, bytes | None]], ...]:
    keys = ask(
        "SELECT sample_key FROM (SELECT sample_key, row_number() OVER (ORDER BY sample_key) - 1 "
        "AS place, count(*) OVER () AS total FROM latents WHERE status = 'ok') "
        f"WHERE total <= {SAMPLES} OR (place * {SAMPLES}) % total < {SAMPLES} ORDER BY sample_key"
    )["sample_key"].to_pylist()
    return tuple(pictures_of(ask, columns, keys).items())


# ------------------------------------------------------------------ the page


def edit_pictures(data: EditData) -> str:
    """Rows of pictures: original, inversion, every variant."""
    stored = (each for _, pictures in data.samples for each in pictures.values() if each)
    return section("edit_pictures", data, all(map(is_pixelated, stored)))


def edit_summary(data: EditData) -> str:
    """What each variant asked for, and the mean of its metrics over all samples."""
    metrics = list(dict.fromkeys(name for v in data.variants for name in v.means))
    notes = "; ".join(f"{name}: {NOTES[name]}" for name in metrics if name in NOTES)
    return section("edit_summary", data, metrics, notes)

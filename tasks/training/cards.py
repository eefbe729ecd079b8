"""The page about a network's weights for people, made from the card for programs beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

WHAT = {
    "e4e": ("e4e", "a picture in, w+ in one pass (arXiv 2102.02766)"),
    "psp": ("pSp", "a picture in, w+ in one pass, every row from its own head (arXiv 2008.00951)"),
    "w-encoder": ("An encoder to W", "a picture in, one w in one pass: e4e's first phase alone"),
    "restyle": (
        "ReStyle",
        "a picture and the render of the codes so far in, what to add to them out "
        "(arXiv 2104.02699)",
    ),
    "lsap": (
        "LSAP",
        "a picture in, w+ in one pass, aligned in the normalised style space (arXiv 2209.12746)",
    ),
    "cycle": (
        "Cycle Encoding",
        "a picture in, one w in one pass, trained W to W+ to W (arXiv 2207.09367)",
    ),
    "clcae": ("CLCAE", "a picture in, w+ and the map F in one pass (arXiv 2211.11448)"),
    "clcae-align": (
        "CLCAE's towers",
        "pictures and codes of W in one space, by contrast (arXiv 2211.11448, stage 1)",
    ),
    "refine": (
        "RefineStyle, two-stage",
        "a picture and its first-stage codes in, low-rank kernel residuals out (arXiv 2410.06104)",
    ),
    "refine_one_stage": (
        "RefineStyle, one-stage",
        "a picture in, w+ and low-rank kernel residuals out (arXiv 2410.06104)",
    ),
}
"""By the stem of the file: title, and what goes in and comes out."""
TOLD = (
    ("batch", "batch"),
    ("learning_rate", "rate"),
    ("mse_weight", "MSE"),
    ("perceptual_weight", "perceptual"),
    ("identity_weight", "identity"),
    ("delta_weight", "offsets"),
    ("adversarial_weight", "latent discriminator"),
    ("nscd_weight", "alignment of styles"),
    ("align_weight", "alignment of W"),
    ("feature_weight", "distance of F"),
    ("pair_weight", "pairs of edits"),
    ("token_weight", "residual's energy"),
)
"""Settings that the page repeats; all of them stand in the card."""


def write_page(weights: str | Path) -> Path:
    """`<STEM>_CARD.md` beside `<stem>.safetensors`, from `<stem>.json`.

    Raises:
        OSError: no weights or no card.
    """
    weights = Path(weights)
    card = json.loads(weights.with_suffix(".json").read_text())
    page = weights.with_name(f"{weights.stem.upper().replace('-', '_')}_CARD.md")
    page.write_text(_page(weights, card), encoding="utf-8")
    return page


def _page(weights: Path, card: dict[str, Any]) -> str:
    title, what = WHAT[weights.stem]
    made = card["provenance"]
    settings = made["settings"]
    with safe_open(weights, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    values = sum(torch.Size(shape).numel() for shape in shapes)
    data = ", ".join(settings.get("data", ())) or "drawn from the generator"
    silent = () if settings.get("align", "") is not None else ("align_weight",)  # nothing to align
    told = [
        f"{name} {settings[key]:g}" for key, name in TOLD if settings.get(key) and key not in silent
    ]
    scores = "\n".join(f"| {name} | {value:.4g} |" for name, value in card["scores"].items())
    return f"""# {title} for {made["generator"]}

{what[0].upper()}{what[1:]}.
{values / 1e6:.2f} M values, {weights.stat().st_size / 1e6:.1f} MB.

- **Data.** {data}.
- **Terms.** {card["terms"]}
- **Shown.** {_shown(made):,}, in {settings["precision"]}.{_before(made)}
- **Settings.** {", ".join(told)}.{_face_network(settings.get("identity"))}
- **Generator.** `{card["generator_hash"]}`; the file fits no other.

| score | value |
|---|---|
{scores}

Means over {_held_out(settings)}, with pictures in [-1, 1]. All settings: `{weights.stem}.json`.

Made by `refinery train {weights.stem.replace("refine_one_stage", "refine --set stages=one")}`.
"""


def _before(made: dict[str, Any]) -> str:
    chain, start = [], made.get("started_from")
    while start:
        chain.append(f"{start['file']} ({start['method']}), which had been shown {_shown(start):,}")
        start = start.get("started_from")
    return f" From {', itself from '.join(chain)}." if chain else " From random weights."


def _shown(made: dict[str, Any]) -> int:
    return made.get("images_shown", made.get("pairs_shown", 0))


def _face_network(identity: str | None) -> str:
    if identity is None:
        return ""
    return f" The identity loss is {identity}: scores by that network are no judge's."


def _held_out(settings: dict[str, Any]) -> str:
    if settings.get("validation_last"):
        return f"the last {settings['validation_last']} pictures of the data, never trained on"
    return ", ".join(settings.get("validation") or ()) or "no held-out pictures"

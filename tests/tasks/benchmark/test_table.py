"""What the benchmark says: chains, claims, the table's text, the plot, the grid."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.errors import ConfigError
from models.inversion.registry import METHODS
from tasks.benchmark.chains import CHAINS, Chain, Link, chosen_chains
from tasks.benchmark.claims import CLAIMS, judge
from tasks.benchmark.figures import LABEL_PX, grid, scatter
from tasks.benchmark.table import markdown

ROW: dict[str, Any] = {
    "pictures": 4,
    "mse": 0.04,
    "psnr": 20.0,
    "ssim": 0.5,
    "trunk_distance": 0.2,
    "identity_judge": 0.31,
    "nscd": 0.03,
    "frechet_reconstruction": 1.5,
    "age_change": 14.94,
    "smile_change": 3.456,
    "identity_judge_edited": 0.28,
    "lec": 0.5,
    "frechet_edited": 2.0,
    "drift_edited": 0.01,
    "parameters": 2_500_000,
    "images_per_s": 10.0,
    "images_per_s_ci": None,
    "seconds_per_image": 0.1,
    "seconds_per_image_ci": 0.0123,
    "bytes_per_picture": 0.0,
}


def result(**rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "Methods",
        "command": "refinery benchmark inversion",
        "machine": {"chip": "test"},
        "data": "val.parquet",
        "generator": "tiny",
        "generator_bytes": 100_000,
        "pictures": 4,
        "batch": 16,
        "perceptual": "trunk_distance",
        "missing_faces": {"identity": "identity: no package"},
        "edits": ["age+3"],
        "order": [*rows, "psp"],
        "rows": {name: {**ROW, **row} for name, row in rows.items()},
        "missing": {"psp": "no weights: refinery train psp"},
        "notes": {"e4e": "as it is"},
    }


def verdicts(found: dict[str, Any]) -> dict[str, tuple[bool | None, str]]:
    return {v.claim: (v.is_met, v.measured) for v in judge(found)}


def test_every_row_is_made_of_registered_methods() -> None:
    assert len({chain.name for chain in CHAINS}) == len(CHAINS)
    for chain in CHAINS:
        assert {link.method for link in chain.links} <= set(METHODS), chain.name
    names = {chain.name for chain in CHAINS} | {"generator"}
    assert {name for claim in CLAIMS for name in (claim.value, claim.over)} <= names
    assert [c.name for c in CHAINS if c.reencoder is None] == [
        "cycle_refine",
        "w",
        "wplus",
        "lsap_o",
    ]


def test_rows_are_chosen_by_name() -> None:
    assert [c.name for c in chosen_chains(["wplus", "e4e"])] == ["e4e", "wplus"]
    assert chosen_chains(None) == CHAINS
    with pytest.raises(ConfigError, match="'e5e' is no row of the table"):
        chosen_chains(["e5e"])


def test_own_weights_come_first_and_missing_ones_say_what_to_train(tmp_path: Path) -> None:
    link = Link(method="cycle", weights="w-encoder", settings={"all_heads": False})
    table, lacking = link.resolved(str(tmp_path), "0" * 64)
    assert lacking == "no weights: refinery train w-encoder"
    file = tmp_path / "w-encoder.safetensors"
    file.touch()
    table, lacking = link.resolved(str(tmp_path), "0" * 64)
    assert (table, lacking) == (
        {"name": "cycle", "all_heads": False, "checkpoint": str(file)},
        "",
    )
    assert Link(method="wplus").resolved(None, "0" * 64) == ({"name": "wplus"}, "")
    assert Chain(name="x", links=(link,)).reencoder == "cycle"


def test_claims_are_met_by_their_numbers() -> None:
    found = verdicts(
        result(
            e4e={},
            lsap={"nscd": 0.03 * 0.75, "trunk_distance": 0.21, "frechet_edited": 2.0},
            clcae={"mse": 0.019, "age_change": 4.8},
            refine={"mse": 0.021},
        )
    )
    assert found["LSAP: NSCD below e4e's"] == (True, "0.0225 / 0.03 = 0.75")
    assert found["LSAP: perceptual distance"][0] is False
    assert found["LSAP: quality under edit"][0] is False  # not better, only as good
    assert found["CLCAE: MSE against e4e"][0] is True
    assert found["RefineStyle two-stage: MSE"][0] is False
    assert found["CLCAE: an edit ages as far"][0] is False
    assert found["RefineStyle two-stage: an edit ages as far"][0] is True
    assert found["Cycle: MSE of the W pivot"] == (None, "not measured: mse of cycle and w-encoder")


@pytest.mark.parametrize(
    ("speed", "kept", "is_fast", "is_small"), [(100, 2000, True, True), (99, 2001, False, False)]
)
def test_the_claims_of_refine_opt(speed: float, kept: float, is_fast: bool, is_small: bool) -> None:
    rows = {
        "refine_opt": {"images_per_s": speed, "bytes_per_picture": kept},
        "e4e+pti": {"images_per_s": 10},
    }
    found = verdicts(result(**rows))
    assert found["refine_opt: images per hour of PTI"][0] is is_fast
    assert found["refine_opt: stored size against the generator's"][0] is is_small
    assert found["refine_opt: perceptual distance of PTI"] == (True, "0.2 / 0.2 = 1")


def test_the_page(tmp_path: Path) -> None:
    found = result(e4e={}, wplus={"lec": None, "bytes_per_picture": 1500.0})
    page = markdown(json.loads(json.dumps(found)))
    lines = page.splitlines()
    assert lines[0] == "# Methods"
    parts = page.split("\n## ")
    assert [part.partition("\n")[0] for part in parts[1:]] == [
        "Reconstruction",
        "Under edit",
        "Cost",
        "Claims",
    ]
    tables = [[line for line in part.splitlines() if line.startswith("| ")] for part in parts[1:4]]
    assert tables == [
        [
            "| method | MSE ↓ | PSNR ↑ | SSIM ↑ | `trunk_distance` ↓ | identity, judge ↑ | NSCD ↓ "
            "| Frechet ↓ |",
            "| e4e | 0.0400 | 20.00 | 0.500 | 0.2000 | 0.310 | 0.0300 | 1.5000 |",
            "| wplus | 0.0400 | 20.00 | 0.500 | 0.2000 | 0.310 | 0.0300 | 1.5000 |",
            "| psp | no weights: refinery train psp |  |  |  |  |  |  |",
        ],
        [
            "| method | age, years ↑ | smile, logits ↑ | identity, judge ↑ | LEC ↓ | Frechet ↓ "
            "| drift ↓ |",
            "| e4e | 14.9 | 3.46 | 0.280 | 0.500 | 2.0000 | 0.0100 |",
            "| wplus | 14.9 | 3.46 | 0.280 |  | 2.0000 | 0.0100 |",
        ],
        [
            "| method | parameters, M | images/s | s/image | kB kept |",
            "| e4e | 2.50 | 10.00 | 0.100 ± 0.012 | 0.0 |",
            "| wplus | 2.50 | 10.00 | 0.100 ± 0.012 | 1.5 |",
        ],
    ]
    assert "(identity: no package)" in page  # why nobody has that column
    assert "the distance in the bundled trunk (not LPIPS)" in page
    assert "| CLCAE: MSE against e4e | <= 0.5 x | not measured: mse of clcae | open |" in lines
    assert "- e4e: as it is" in lines


def test_the_plot_has_a_circle_for_each_method_that_edits() -> None:
    svg = scatter(
        result(
            fast={"trunk_distance": 0.1, "frechet_edited": 1.0, "seconds_per_image": 0.01},
            slow={"trunk_distance": 0.3, "frechet_edited": 3.0, "seconds_per_image": 10.0},
            still={"frechet_edited": None},
        )
    )
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
    (fast, slow) = [tuple(map(float, circle)) for circle in circles]
    assert fast[0] < slow[0]
    assert fast[1] > slow[1]  # SVG counts downwards
    assert (fast[2], slow[2]) == (5.0, 22.0)
    assert scatter(result(still={"frechet_edited": None})).endswith("</svg>\n")


def test_the_grid_puts_the_pictures_where_they_belong() -> None:
    inputs = torch.full((2, 3, 8, 8), -1.0)
    shown = {"a": [torch.full((2, 3, 8, 8), 0.0)], "b": [torch.full((2, 3, 8, 8), 1.0)]}
    pixels = np.asarray(grid(inputs, shown, []))
    assert pixels.shape == (16 + 16, LABEL_PX + 2 * (16 + 4), 3)
    assert pixels[16 + 4, LABEL_PX + 4].tolist() == [0, 0, 0]
    assert pixels[16 + 4, LABEL_PX + 8 + 4].tolist() == [128, 128, 128]
    assert pixels[16 + 8 + 4, LABEL_PX + 20 + 8 + 4].tolist() == [255, 255, 255]

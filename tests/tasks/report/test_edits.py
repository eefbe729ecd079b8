"""What the page says of edits."""

import io
import itertools
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from PIL import Image

from tasks.report.edits import SAMPLES, edit_pictures, edit_summary, gather_edits

VARIANT: dict[str, Any] = {
    "name": "both",
    "edits": [{"name": "/a/b/age.json", "strength": 2.0}, {"name": "smile", "strength": -1.0}],
    "domains": [{"name": "s3://x/impasto/", "strength": 0.7}],
    "blends": [{"sample_key": "<b>.png", "share": 0.25, "rows": [1, 2]}],
    "assigned": "styles.csv",
    "residual": 0.5,
}
CONFIG = {"source": "runs/<i>faces", "variants": [VARIANT]}


def picture() -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def gathered(count: int) -> Any:
    keys = [f"<k>{index:03d}" for index in range(count)]
    latents = pa.table(
        {
            "sample_key": keys,
            "status": ["ok"] * count,
            "drift@both": pa.array([0.1 * index for index in range(count)], pa.float32()),
            "age_change@both": pa.array([None] * count, pa.float32()),
            "psnr": pa.array([1.0] * count, pa.float32()),
        }
    )
    images = pa.table(
        {name: keys if name == "sample_key" else [picture()] * count for name in PICTURES}
    )
    with duckdb.connect() as connection:
        connection.register("latents", latents)
        connection.register("images", images)
        schemas = {"latents": latents.schema, "images": images.schema}
        return gather_edits(lambda sql: connection.sql(sql).to_arrow_table(), CONFIG, schemas)


PICTURES = ("sample_key", "inversion", "both")


def test_what_was_asked_for_and_what_came_of_it() -> None:
    found = gathered(3)
    (variant,) = found.variants
    assert variant.asked == (
        "age +2, smile -1, domain impasto 0.7, 0.25 of <b>.png in rows 1, 2, domains of "
        "styles.csv, own residual 0.5"
    )
    assert variant.means["drift"] == pytest.approx(0.1)
    assert found.columns == ("inversion", "both")
    page = edit_summary(found)
    assert "<b>.png" not in page
    assert "&lt;b&gt;.png" in page
    assert '<td class="n">0.100</td>' in page
    assert '<td class="n">-</td>' in page  # no attribute was measured


@pytest.mark.parametrize("count", [1, SAMPLES, SAMPLES + 1, 5 * SAMPLES + 7])
def test_samples_are_spread_over_the_run(count: int) -> None:
    keys = [key for key, _ in gathered(count).samples]
    assert len(keys) == min(count, SAMPLES)
    places = [int(key.removeprefix("<k>")) for key in keys]
    assert places == sorted(places)
    assert places[0] == 0
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_pictures_stand_in_rows_and_hostile_names_stay_text() -> None:
    page = edit_pictures(gathered(2))
    assert page.count("<img ") == 4
    assert "<k>" not in page
    assert 'alt="both of &lt;k&gt;001"' in page


def test_nothing_is_committed_yet() -> None:
    found = gather_edits(None, CONFIG, {})
    assert (found.samples, found.variants[0].means) == ((), {})
    assert "none is committed" in edit_pictures(found)
    assert "both" in edit_summary(found)

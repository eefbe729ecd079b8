"""What changed between two runs, over rows whose difference is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import wilcoxon

from models.errors import ConfigError
from tasks.catalogue.diff import compare, hotelling, write_strip
from tasks.job import JobConfig, MethodConfig, OutputConfig
from tasks.run.ledger import write_marker
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker
from tasks.run.parts import Layout, write_parts
from tasks.run.rows import Row, encode_picture
from tasks.run.run_json import Declared, create_run

ROWS = 40


def write_run(
    uri: str,
    codes: np.ndarray,
    mse: np.ndarray,
    *,
    keys: list[str] | None = None,
    generator: str = "ab",
    failed: tuple[int, ...] = (),
    shade: int = 0,
) -> str:
    """A run of one shard: its codes [N 2 3] and scores, and pictures of one colour a row."""
    output = OutputConfig(pictures=("input", "inversion"))
    job = JobConfig(generator="faces64", methods=(MethodConfig(name="e4e"),), output=output)
    info = ManifestInfo(num_shards=1, num_samples=len(codes), num_bytes=0, sha256="0" * 64)
    declared = Declared(
        kind="invert",
        stages=("read",),
        stores_doors=True,
        method="e4e",
        metrics=("mse",),
        pictures=("input", "inversion"),
    )
    run = create_run(uri, job, info, {"generator": generator * 32}, "test", declared)
    rows = []
    for at in range(len(codes)):
        key = keys[at] if keys else f"{at:02d}.png"
        row = Row(sample_key=key, image_uri=key, image_sha256=f"{at:064d}", seed=at)
        if at in failed:
            row.fail("diverged", "it diverged")
        else:
            row.w_plus, row.metrics = codes[at].astype(np.float32), {"mse": float(mse[at])}
            for name, value in (("input", at), ("inversion", 100 + shade)):
                pixels = np.full((8, 8, 3), value, np.uint8)
                row.pictures[name] = encode_picture(pixels, "png")
        rows.append(row)
    layout = Layout(method="e4e", metrics=("mse",), shape=(2, 3), output=output)
    parts = write_parts(rows, layout, run, 0, "a")
    marker = Marker(
        shard=0,
        attempt="a",
        run_id=run.run_id,
        rows=len(rows),
        failed=len(failed),
        parts=parts,
        seconds={},
        wall_s=1.0,
    )
    write_marker(uri, marker)
    return uri


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_drift_that_is_there(tmp_path: Path, draw: np.random.Generator) -> None:
    codes = draw.normal(size=(ROWS, 2, 3))
    mse = draw.uniform(1, 2, ROWS).astype(np.float32)
    moved = (mse + draw.normal(0.1, 0.05, ROWS)).astype(np.float32)
    a = write_run(str(tmp_path / "a"), codes, mse)
    b = write_run(str(tmp_path / "b"), codes + 0.5, moved, shade=50)
    found = compare(a, b)
    metric, code = found.drifts
    difference = moved.astype(np.float64) - mse
    assert (metric.name, metric.rows, metric.verdict) == ("mse", ROWS, "drifted")
    assert metric.change == pytest.approx(difference.mean(), rel=1e-6)
    assert metric.effect == pytest.approx(difference.mean() / difference.std(ddof=1), rel=1e-5)
    plain = float(wilcoxon(difference)[1])
    assert plain <= metric.p <= 2 * plain * 1.0001  # of two tests
    assert (code.name, code.verdict) == ("w_plus", "drifted")
    assert code.change == pytest.approx(0.5 * np.sqrt(6), rel=1e-5)
    assert found.counts["other values"] == str(ROWS)
    assert found.counts["as before"] == "0"

    assert write_strip(found, str(tmp_path / "strip.png"), 3) == 3
    order = np.argsort(-np.abs(difference))
    with Image.open(tmp_path / "strip.png") as strip:
        for line, row in enumerate(order[:3]):  # input, A, B
            colours = [strip.getpixel((c * 100 + 48, 16 + line * 100 + 48))[0] for c in range(3)]
            assert colours == [row, 100, 150]


def test_noise_is_no_drift(tmp_path: Path, draw: np.random.Generator) -> None:
    codes = draw.normal(size=(ROWS, 2, 3))
    mse = draw.uniform(1, 2, ROWS)
    noise = draw.normal(0, 0.05, ROWS // 2)
    a = write_run(str(tmp_path / "a"), codes, mse)
    jitter = draw.normal(0, 0.1, (ROWS // 2, 2, 3))
    b = write_run(
        str(tmp_path / "b"),
        codes + np.concatenate([jitter, -jitter]),
        mse + np.concatenate([noise, -noise]),
    )
    assert [drift.verdict for drift in compare(a, b).drifts] == ["within chance"] * 2


def test_rows_that_came_went_and_failed(tmp_path: Path, draw: np.random.Generator) -> None:
    codes, mse = draw.normal(size=(4, 2, 3)), np.ones(4)
    a = write_run(str(tmp_path / "a"), codes, mse, keys=["a", "b", "c", "d"])
    b = write_run(str(tmp_path / "b"), codes, mse, keys=["b", "c", "d", "e"], failed=(1,))
    found = compare(a, b)
    assert {row["sample_key"]: row["what"] for row in found.rows.to_pylist()} == {
        "a": "only in A",
        "b": "other input",
        "c": "ok -> failed",
        "d": "other input",
        "e": "only in B",
    }
    assert found.counts["in both"] == "3"


def test_codes_of_two_generators_are_not_compared(
    tmp_path: Path, draw: np.random.Generator
) -> None:
    codes, mse = draw.normal(size=(ROWS, 2, 3)), draw.uniform(1, 2, ROWS)
    a = write_run(str(tmp_path / "a"), codes, mse)
    b = write_run(str(tmp_path / "b"), codes, mse, generator="cd")
    assert [drift.name for drift in compare(a, b).drifts] == ["mse"]


def test_runs_without_a_common_sample(tmp_path: Path, draw: np.random.Generator) -> None:
    codes, mse = draw.normal(size=(2, 2, 3)), np.ones(2)
    a = write_run(str(tmp_path / "a"), codes, mse, keys=["a", "b"])
    b = write_run(str(tmp_path / "b"), codes, mse, keys=["c", "d"])
    with pytest.raises(ConfigError, match="no sample_key in common"):
        compare(a, b)
    assert json.loads(Path(a, "run.json").read_text())["declared"]["kind"] == "invert"


def test_hotelling_keeps_its_level(draw: np.random.Generator) -> None:
    """Under no drift the probability is uniform enough: 5 % of the time it is below 5 %."""
    found = [hotelling(draw.normal(size=(60, 4))) for _ in range(400)]
    share = np.mean([p is not None and p < 0.05 for p in found])
    assert 0.02 < share < 0.09
    assert hotelling(draw.normal(size=(60, 4)) + 1) < 1e-6
    assert hotelling(np.zeros((60, 4))) is None
    assert hotelling(np.ones((2, 4))) is None

"""Directions from stored codes and labels: from codes of known make, and from a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoints.native import save_generator
from models.editing.boundary import fit_boundary
from models.editing.direction import load_direction
from models.errors import AssetError, ConfigError
from models.stylegan2.generator import Generator, weights_hash
from tasks.directions.boundaries import (
    FitBoundaryConfig,
    Label,
    LabelledCodes,
    fit_boundaries,
    fit_from_codes,
    is_held_out,
)
from tasks.run.stored import read_inversions
from tasks.work.invert import Inverter
from tests.conftest import make_tiny_generator
from tests.tasks.small_run import SmallRun, begin, make_job, write_pictures

RED = Label(name="red", column="red", low=-0.2, high=0.2)
BOTH = Label(name="both", column="both", low=-0.3, high=0.3)


def config(*properties: Label, **changes: object) -> FitBoundaryConfig:
    return FitBoundaryConfig(run="run", labels=("a",), properties=properties, **changes)


def codes(seed: int, n: int = 400) -> LabelledCodes:
    """Three numbers a row; `red` is the first one's mean over rows, `both` the sum of two. Row 2
    alone holds `late`."""
    draw = torch.Generator().manual_seed(seed)
    w_plus = torch.randn(n, 1, 3, generator=draw) + 0.3 * torch.randn(n, 4, 3, generator=draw)
    mean = w_plus.mean(1).double()
    values = {"red": mean[:, 0], "both": mean[:, 0] + mean[:, 1], "late": w_plus[:, 2, 2].double()}
    values["red"][:5] = float("nan")
    return LabelledCodes(
        sample_keys=tuple(map(str, range(n))),
        w_plus=w_plus,
        values=values,
        source={"run_id": "ab12", "weights": {"generator": "00"}},
    )


def test_each_direction_leaves_the_others_alone() -> None:
    """Red alone is orthogonal to red + green: (1 -1 0); and both alone is green."""
    found = fit_from_codes(codes(0), codes(1), "h", config(RED, BOTH, terms="free", ridge=0.1))
    red, both = found["red"], found["both"]
    assert red.vector.tolist() == pytest.approx([2**-0.5, -(2**-0.5), 0.0], abs=0.1)
    assert both.vector.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=0.15)
    assert (red.card["leaves_alone"], red.card["terms"]) == (["both"], "free")
    assert "ab12" in red.card["fitted_on"]
    assert red.generator_hash == "h"
    along = codes(0).w_plus.mean(1).double() @ red.vector.double()
    assert red.unit == pytest.approx(float(along.std()))


def test_what_a_direction_leaves_alone_can_be_chosen() -> None:
    some = replace(RED, leaves_alone=())
    plain = fit_from_codes(codes(0), codes(1), "h", config(some, BOTH))["red"]
    assert plain.vector.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=0.1)
    assert plain.accuracy is not None
    assert plain.accuracy > 0.97
    train = codes(0)
    rows = (train.values["red"] <= -0.2) | (train.values["red"] >= 0.2)
    want = fit_boundary(train.w_plus[rows].mean(1), train.values["red"][rows] >= 0.2, 1.0)
    assert torch.equal(plain.vector, want)
    sharp = replace(some, ridge=0.01)
    own = fit_from_codes(codes(0), codes(1), "h", config(sharp, BOTH))["red"]
    assert torch.equal(
        own.vector, fit_boundary(train.w_plus[rows].mean(1), train.values["red"][rows] >= 0.2, 0.01)
    )
    assert (own.card["ridge"], plain.card["ridge"]) == (0.01, 1.0)
    # What it leaves alone is fitted at its ridge as well.
    mixed = fit_from_codes(codes(0), codes(1), "h", config(replace(RED, ridge=0.01), BOTH))["red"]
    want_mixed = fit_from_codes(codes(0), codes(1), "h", config(RED, BOTH, ridge=0.01))["red"]
    assert torch.equal(mixed.vector, want_mixed.vector)
    svm = fit_from_codes(codes(0), codes(1), "h", config(some, loss="svm"))["red"]
    assert not torch.equal(svm.vector, want)
    assert svm.card["loss"] == "svm"


def test_a_vector_for_each_row() -> None:
    """What only one row knows is found there; rows that are left out do not move."""
    late = Label(name="late", column="late", low=-0.2, high=0.2, layers=(1, 2))
    found = fit_from_codes(codes(0), codes(1), "h", config(late, space="w_plus", ridge=1e-4))[
        "late"
    ]
    assert (found.space, found.layers) == ("w_plus", (1, 2))
    assert torch.equal(found.vector[[0, 3]], torch.zeros(2, 3))
    assert float(found.vector.norm()) == pytest.approx(1.0)
    assert float(found.vector[2, 2]) > 0.95
    assert float(found.vector[1].norm()) < 0.25
    along = codes(0).w_plus.flatten(1) @ found.vector.flatten()
    assert found.unit == pytest.approx(float(along.std()), 1e-5)
    assert found.accuracy is not None
    assert found.accuracy > 0.95


def test_what_gives_no_direction() -> None:
    one = Label(name="red", column="red", low=-99, high=0.2)
    with pytest.raises(ConfigError, match=r"label red: of 400 samples \d+ have red >= 0.2 and 0 "):
        fit_from_codes(codes(0), codes(1), "h", config(one))
    with pytest.raises(ConfigError, match=r"nothing of it is left .* leave one of same out"):
        fit_from_codes(codes(0), codes(1), "h", config(RED, replace(RED, name="same")))


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"expected low < high, got 3\.0, 3\.0"):
        Label(name="age", column="age", low=3.0, high=3.0)
    with pytest.raises(ConfigError, match=r"expected one or more different names, got \[\]"):
        config()
    with pytest.raises(ConfigError, match="different names"):
        config(RED, RED)
    with pytest.raises(ConfigError, match=r"leaves_alone names 'hat'; the others are both"):
        config(replace(RED, leaves_alone=("hat",)), BOTH)
    with pytest.raises(ConfigError, match="label red: expected ridge > 0, got -1"):
        replace(RED, ridge=-1)
    with pytest.raises(ConfigError, match=r"got ridge=0.0, held_out_share=0.1"):
        config(RED, ridge=0.0)


def test_who_is_held_out_depends_on_the_key_alone() -> None:
    keys = [f"a.parquet:{row}" for row in range(4000)]
    held = [is_held_out(key, 0.1) for key in keys]
    assert 0.08 < sum(held) / len(keys) < 0.12
    assert all(is_held_out(key, 0.3) for key, is_in in zip(keys, held, strict=True) if is_in)


@pytest.fixture
def run(tiny_generator: Generator, tmp_path: Path, face_bytes: list[bytes]) -> SmallRun:
    job = make_job(tiny_generator, tmp_path)
    pictures = write_pictures(tmp_path / "in", face_bytes)
    found = begin(str(tmp_path / "out"), str(pictures), job, Inverter(job, "cpu"), 4)
    return found.finish()


def settings(run: SmallRun, folder: Path, **changes: object) -> FitBoundaryConfig:
    rows = "".join(f"face-{i}.png,{i % 2}\n" for i in range(8))
    (folder / "labels.csv").write_text("key,odd\n" + rows)
    values = {
        "generator": run.job.generator,
        "out": str(folder / "directions"),
        "run": run.uri,
        "labels": (str(folder / "labels.csv"),),
        "key_column": "key",
        "properties": (Label(name="odd", column="odd", low=0, high=1),),
        "held_out_run": run.uri,
    }
    return FitBoundaryConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_from_a_run_to_a_file(run: SmallRun, tiny_generator: Generator, tmp_path: Path) -> None:
    """The failed sample has no code and is left out; the file holds what the codes say."""
    (path,) = fit_boundaries(settings(run, tmp_path))
    assert path == tmp_path / "directions" / "odd.json"
    found = load_direction(path)
    stored, is_odd = [], []
    for batch in read_inversions(run.uri, tiny_generator):
        stored.append(batch.inversion.w_plus.mean(1))
        is_odd += [int(key[5]) % 2 == 1 for key in batch.sample_keys]
    assert len(is_odd) == 8
    want = fit_boundary(torch.cat(stored), torch.tensor(is_odd))
    torch.testing.assert_close(found.vector, want)
    assert found.generator_hash == weights_hash(tiny_generator)
    assert found.card["fitted_on"].startswith("8 stored codes of run ")
    found.check_generator(tiny_generator)


def test_a_share_of_the_run_is_held_out(run: SmallRun, tmp_path: Path) -> None:
    keys = [f"face-{i}.png" for i in range(8)]
    share = 0.5
    held = [key for key in keys if is_held_out(key, share)]
    assert {int(key[5]) % 2 for key in held} == {0, 1}, "choose another share for this test"
    (path,) = fit_boundaries(settings(run, tmp_path, held_out_run=None, held_out_share=share))
    card = load_direction(path).card
    assert card["fitted_on"].startswith(f"{8 - len(held)} stored codes")
    assert card["accuracy_on"].startswith(f"{len(held)} held-out codes")


def test_labels_and_generator_must_fit_the_run(run: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the 8 keys is a sample of .*labels.csv:0"):
        fit_boundaries(settings(run, tmp_path, key_column=None))
    wrong = Label(name="hat", column="hat", low=0, high=1)
    with pytest.raises(ConfigError, match="no column 'hat'; it has key, odd"):
        fit_boundaries(settings(run, tmp_path, properties=(wrong,)))
    other = save_generator(make_tiny_generator(1), tmp_path / "other.safetensors", {"terms": "t"})
    with pytest.raises(AssetError, match="was made with generator"):
        fit_boundaries(settings(run, tmp_path, generator=str(other)))

"""Reading labelled pictures: columns that are there and not, the held-out fifth."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.errors import AssetError
from tasks.training.assets.labels import draw_weights, is_held_out, load_labelled


def write(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_faces_and_portraits_in_one(tmp_path: Path, face_bytes: list[bytes]) -> None:
    faces = write(
        tmp_path / "faces.parquet",
        id=["face-4", "face-b"],
        image=[{"bytes": data, "path": None} for data in face_bytes[:2]],
        age=[31, 62],
        gender=[1, 0],
        smile_prob=[0.25, None],
        sharpness=[1.0, 2.0],
    )
    names = [f"impasto_{index:03d}" for index in range(3)]
    styles = ["impasto", "fantasy", "illustration"]
    portraits = write(tmp_path / "p.parquet", id=names, image=face_bytes[2:5], style=styles)
    bare = write(tmp_path / "bare.parquet", image=face_bytes[5:6])
    found = load_labelled([faces, portraits, bare], 16)
    assert found.pictures.shape == (6, 3, 16, 16)
    assert found.medium.tolist() == [0, 0, 1, 2, 3, 0]
    assert found.labels["age"][:2].tolist() == [31, 62]
    assert found.labels["gender"][:2].tolist() == [1, 0]
    assert found.labels["smile"].isnan().tolist() == [False, True, True, True, True, True]
    assert found.is_held_out[2:5].tolist() == [is_held_out(name) for name in names]
    assert found.is_held_out[[0, 1, 5]].tolist() == [False] * 3
    last = found.at(torch.tensor([3, 0]))
    assert last.medium.tolist() == [2, 0]
    assert last.labels["age"][1] == 31
    assert torch.equal(last.pictures[0], found.pictures[3])
    assert len(found.at(found.medium == 0)) == 3


def test_unknown_styles_are_refused(tmp_path: Path, face_bytes: list[bytes]) -> None:
    path = write(tmp_path / "p.parquet", image=face_bytes[:1], style=["cubism"])
    with pytest.raises(AssetError, match=r"p\.parquet: style 'cubism' is unknown; known: photo"):
        load_labelled([path], 16)


def test_a_fifth_is_held_out_by_the_hash_of_its_id() -> None:
    names = [f"fantasy_{index:03d}" for index in range(500)]
    share = sum(map(is_held_out, names)) / 500
    assert share == pytest.approx(0.2, abs=0.05)
    assert is_held_out("face-4")
    digest = int(hashlib.sha256(b"fantasy_007").hexdigest(), 16)
    assert is_held_out("fantasy_007") == (digest % 5 == 0)


def test_weights_balance_decades_and_part_age_from_gender() -> None:
    ages = torch.tensor([21.0] * 16 + [75.0] * 4)
    gender = torch.tensor([0.0] * 12 + [1.0] * 4 + [0.0] * 3 + [1.0])
    for balance, old in ((0, 0.2), (0.5, 1 / 3), (1, 0.5)):
        weights = draw_weights({"age": ages, "gender": gender}, balance)
        assert float(weights[16:].sum()) == pytest.approx(old)
        assert float(weights[:12].sum()) == pytest.approx((1 - old) / 2)
        assert float(weights[16:19].sum()) == pytest.approx(old / 2)
    only_men = draw_weights({"age": ages, "gender": torch.zeros(20)}, 1)
    assert float(only_men[16:].sum()) == pytest.approx(0.5)
    unknown = torch.full((5,), torch.nan)
    torch.testing.assert_close(
        draw_weights({"age": unknown, "gender": unknown}, 0.5), torch.full((5,), 0.2)
    )

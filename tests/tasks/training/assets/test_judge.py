"""The judge: coverage on points whose neighbours are known, and real features where they are."""

from pathlib import Path

import pytest
import torch

from tasks.training.assets.judge import Judge, covered


def test_coverage_is_by_the_distance_to_the_third_neighbour() -> None:
    # On a line at 0, 1, 2, 3: the third neighbour of the ends is 3 away, of the middle ones 2.
    others = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    points = torch.tensor([[-2.9], [-3.1], [5.9], [1.5], [100.0]])
    assert covered(points, others) == pytest.approx(3 / 5)
    assert covered(others, others) == 1.0


def test_too_few_pictures_have_no_third_neighbour() -> None:
    with pytest.raises(ValueError, match="more than 3 pictures, found 3"):
        covered(torch.zeros(2, 1), torch.zeros(3, 1))


def test_real_pictures_are_nearer_to_each_other_than_to_noise(
    shared: Path, face_pictures: torch.Tensor
) -> None:
    judge = Judge(shared / "weights/squeezenet1_1/squeezenet1_1_features_caffe.safetensors")
    faces = judge.features(face_pictures)
    assert faces.shape == (len(face_pictures), 256)
    noise = judge.features(torch.rand(len(faces), 3, 64, 64) * 2 - 1)
    first, second = faces.chunk(2)
    good, bad = judge.verdict(first, second), judge.verdict(noise, second)
    assert bad.frechet > 10 * good.frechet
    assert bad.precision == 0.0
    assert good.precision > 0.5


@pytest.fixture
def face_pictures(shared: Path) -> torch.Tensor:
    """[64 3 64 64] of the held-out faces."""
    from tasks.training.data import load_pictures

    pictures = load_pictures([str(shared / "data/faces/val64-000.parquet")], 64)[:64]
    return pictures.float() / 127.5 - 1

"""The demo's sample shard: what is in it, that it is the same every time, and what it says."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from models.errors import SampleError
from models.stylegan2.generator import Generator
from pipeline import demo_data
from pipeline.demo_data import DRAWN, aligned_astronaut, draw_faces, write_demo_shard
from tasks.input.decode import decode
from tasks.input.read import read_shard
from tasks.job import InputConfig
from tasks.run.manifest import plan_shards


def members_of(shard: str) -> dict[str, bytes]:
    with tarfile.open(shard) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def test_shard_holds_24_drawn_faces_one_photograph_and_three_broken_files(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    shard = write_demo_shard(tmp_path / "pictures", generator=tiny_generator)

    members = members_of(shard)
    good = [f"drawn-{index:02d}.png" for index in range(24)] + ["astronaut.png"]
    broken = ["broken-empty.png", "broken-text.jpg", "broken-truncated.png"]
    assert sorted(members) == sorted(good + broken)
    for name in good:
        with Image.open(io.BytesIO(members[name])) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (32, 32))
    assert members["broken-empty.png"] == b""
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(members["broken-text.jpg"]))
    with pytest.raises(OSError, match=r"truncated|broken"):
        Image.open(io.BytesIO(members["broken-truncated.png"])).load()


def test_shard_is_the_same_bytes_whatever_the_threads_and_the_random_state(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    first = Path(write_demo_shard(tmp_path / "a", generator=tiny_generator)).read_bytes()
    torch.manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = Path(write_demo_shard(tmp_path / "b", generator=tiny_generator)).read_bytes()
    finally:
        torch.set_num_threads(before)

    assert first == second
    assert (tmp_path / "a/TERMS.md").read_text() == (tmp_path / "b/TERMS.md").read_text()


def test_a_drawn_face_does_not_depend_on_how_many_are_drawn(tiny_generator: Generator) -> None:
    many, few = draw_faces(tiny_generator, 5), draw_faces(tiny_generator, 2)

    assert many.dtype == np.uint8
    assert many.shape == (5, 32, 32, 3)
    np.testing.assert_array_equal(many[:2], few)
    assert not np.array_equal(many[0], many[1])


def test_reading_the_shard_gives_three_failures_with_reasons(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    shard = write_demo_shard(tmp_path, generator=tiny_generator)

    (spec,) = plan_shards(shard, shard_size=100)
    failures = {}
    for sample in read_shard(spec, InputConfig()):
        try:
            assert decode(sample, InputConfig(), 32).shape == (32, 32, 3)
        except SampleError as error:
            failures[sample.key.rpartition(":")[2]] = error.kind

    assert set(failures) == {"broken-empty", "broken-text", "broken-truncated"}
    assert set(failures.values()) <= {"read", "decode"}


def test_astronaut_eyes_and_mouth_lie_on_the_template() -> None:
    face = aligned_astronaut(128).astype(float)

    def patch(x: float, y: float) -> np.ndarray:
        column, row = round(x * 128), round(y * 128)
        return face[row - 3 : row + 4, column - 3 : column + 4]

    cheek = patch(0.3, 0.5).mean()
    # Pupils are dark beside the skin; teeth show between the mouth corners of her smile.
    assert patch(0.299, 0.290).mean() < 0.75 * cheek
    assert patch(0.690, 0.291).mean() < 0.75 * cheek
    teeth, skin = patch(0.49, 0.725), patch(0.3, 0.5)
    assert np.ptp(teeth.mean((0, 1))) < np.ptp(skin.mean((0, 1)))


def test_terms_name_the_generator_its_terms_and_the_photograph(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    tiny_generator.provenance = {"source": "some-weights", "terms": "research only"}

    write_demo_shard(tmp_path, generator=tiny_generator)

    text = (tmp_path / "TERMS.md").read_text()
    assert "some-weights" in text
    assert "research only" in text
    assert "NASA" in text
    assert "public domain" in text
    assert f"drawn-{DRAWN - 1}" in text
    assert demo_data.SHARD_NAME in text

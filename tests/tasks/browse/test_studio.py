"""A photo of one's own: aligned where a face is found, cut with a note where none is."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut, coffee

from models.checkpoints.load import load_generator
from models.stylegan2.generator import weights_hash
from pipeline.demo_data import aligned_astronaut, draw_faces
from tasks.browse.studio import Studio
from tasks.input.detect import has_mtcnn
from tasks.job import JobConfig, MethodConfig
from tasks.run import run_json
from tasks.run.manifest import ManifestInfo
from tests.tasks.small_run import DECLARED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Of a run of the bundled generator that has no row yet."""
    uri = str(tmp_path_factory.mktemp("studio") / "run")
    job = JobConfig(generator="faces64", methods=(MethodConfig(name="e4e"),), perceptual="none")
    hashes = {"generator": weights_hash(load_generator("faces64"))}
    run_json.create_run(uri, job, ManifestInfo(1, 1, 1, "00" * 32), hashes, "test", DECLARED)
    return Studio(uri)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def test_a_photograph_is_aligned(studio: Studio) -> None:
    if not has_mtcnn():
        pytest.skip("the extra `faces` is not installed")
    found = studio.invert(encoded(astronaut(), "JPEG"))

    assert found.notes == ()
    wanted = aligned_astronaut(64).astype(int)
    difference = np.abs(found.picture.astype(int) - wanted).mean()
    cut = np.asarray(Image.fromarray(astronaut()).resize((64, 64))).astype(int)
    assert difference < 0.5 * np.abs(cut - wanted).mean()
    assert found.metrics["psnr"] > 15


def test_a_picture_that_is_aligned_stays_as_it_is(studio: Studio) -> None:
    face = draw_faces(studio.generator, 1)[0]

    found = studio.invert(encoded(face))

    np.testing.assert_array_equal(found.picture, face)


def test_without_a_face_it_is_cut_and_says_so(studio: Studio) -> None:
    found = studio.invert(encoded(coffee()))

    (note,) = found.notes
    assert note.startswith("Not aligned")
    assert found.picture.shape == (64, 64, 3)


def test_bundled_directions_and_domains_are_there(studio: Studio) -> None:
    face = studio.invert(encoded(draw_faces(studio.generator, 1)[0]))
    names = {slider.id for slider in studio.sliders(face.inversion)}

    assert {"direction.age", "direction.smile", "domain.impasto"} <= names
    plain = studio.render(face.inversion, {}).astype(int)
    older = studio.render(face.inversion, {"direction.age": 2.0}).astype(int)
    both = studio.render(face.inversion, {"direction.age": 2.0, "domain.impasto": 1.0}).astype(int)
    assert np.abs(older - plain).mean() > 2
    assert np.abs(both - older).mean() > 2


def test_folders_beside_the_run_are_looked_into(studio: Studio, tmp_path: Path) -> None:
    from tests.tasks.small_edit import write_direction

    (tmp_path / "directions").mkdir()
    write_direction(studio.generator, tmp_path / "directions/mine.json")
    stranger = load_generator("hands64")
    write_direction(stranger, tmp_path / "directions/hands.json")

    found = Studio(studio.run_uri, [tmp_path])

    assert "mine" in found.directions
    assert "hands" not in found.directions
    face = studio.invert(encoded(draw_faces(studio.generator, 1)[0]))
    (mine,) = (s for s in found.sliders(face.inversion) if s.name == "mine")
    assert mine.argument == str(tmp_path / "directions/mine.json")

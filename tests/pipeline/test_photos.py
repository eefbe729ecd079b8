"""From raw photographs to photographs with other faces in them, by the commands a user gives."""

import hashlib
import io
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms, ImageDraw
from scipy.ndimage import gaussian_filter
from skimage.data import camera

from models.detection import mtcnn
from pipeline.cli import run_app
from pipeline.demo_data import write_demo_photograph
from tasks.input.decode import decode_all
from tasks.input.face import Crop
from tasks.run.ledger import read_markers, write_marker
from tasks.run.parts import to_parquet
from tasks.run.query import query
from tasks.run.run_json import read_declared
from tests.pipeline.photo_scenes import (
    Square,
    astronaut_square,
    files,
    real_squares,
    scene,
    tiny_face_config,
)

pytest.importorskip("joblib")
pytestmark = pytest.mark.timeout(600)
INLINE = ["--engine", "inline", "--no-flow"]
FACES = "SELECT sample_key, status, error_kind, error, image_uri, face_box, face_points, "
FACES += "face_transform, face_score FROM latents ORDER BY sample_key"
PROFILE_NOSE = (253, 169)
"""Tip of the nose of the man with the camera, pixels."""
UNTOUCHED = 6
"""JPEG: largest change of a pixel far from every face, of 255, when it is encoded once more."""


def invert(photos: Path, run: Path, *more: str) -> int:
    config = tiny_face_config(run.parent)
    return run_app(["invert", str(photos), str(run), "--align", "--config", config, *INLINE, *more])


def compose(run: Path, out: Path, *sets: str) -> int:
    flags = [part for item in sets for part in ("--set", item)]
    return run_app(["compose", str(run), str(out), *INLINE, *flags])


def rows(run: Path) -> list[dict]:
    found = query(str(run), FACES).to_pylist()
    for row in found:
        if row["face_points"] is not None:
            row["points"] = np.reshape(row["face_points"], (5, 2))
    return found


def shift_between(before: np.ndarray, after: np.ndarray, reach: int = 5) -> int:
    """How far `after` has moved against `before`, pixels: where their difference is smallest."""
    before, after = (gaussian_filter(each.mean(2), 2) for each in (before, after))
    inner = (slice(reach, -reach),) * 2
    costs = {
        (dy, dx): np.abs(np.roll(after, (dy, dx), (0, 1))[inner] - before[inner]).mean()
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
    }
    return max(map(abs, min(costs, key=costs.__getitem__)))


def check_scenes(tmp_path: Path, squares: list[Square], count: int) -> None:
    """Each face goes out, through a crop, and back: it lies where it lay, and is the same face."""
    rng = np.random.default_rng(7)
    photos, known, run, out = tmp_path / "photos", {}, tmp_path / "run", tmp_path / "out"
    photos.mkdir()
    for number in range(count):
        chosen = [squares[at] for at in rng.integers(0, len(squares), rng.integers(1, 4))]
        photo, known[f"{number:03d}.png"] = scene(chosen, rng)
        photo.save(photos / f"{number:03d}.png", compress_level=1)
    assert invert(photos, run) == 0
    total, offs, shares = 0, list[float](), list[float]()
    by_photo: dict[str, list[dict]] = {}
    for row in rows(run):
        by_photo.setdefault(row["sample_key"].partition("#")[0], []).append(row)
    assert set(by_photo) == set(known)
    for name, places in known.items():
        total += len(places)
        for points in (row["points"] for row in by_photo[name] if row["status"] == "ok"):
            nearest = min(places, key=lambda place, p=points: np.abs(place - p).max())
            eyes = np.hypot(*(nearest[1] - nearest[0]))
            off = np.hypot(*(points.mean(0) - nearest.mean(0)))
            assert off < max(2, 0.15 * eyes), name
            offs.append(off)
            shares.append(off / eyes)
    assert np.median(offs) < 2
    assert np.quantile(shares, 0.98) < 0.1
    assert len(offs) >= 0.97 * total
    # The inputs themselves are put back: whatever moved or was swapped would show.
    assert compose(run, out, 'pictures=["input"]', "paste.match=0") == 0
    assert run_app(["verify", str(out)]) == 0
    for name, faces in by_photo.items():
        good = [row for row in faces if row["status"] == "ok"]
        if not good:
            continue
        before = np.array(Image.open(photos / name)).astype(int)
        after = np.array(Image.open(out / "photos/input" / name)).astype(int)
        touched = np.zeros(before.shape[:2], bool)
        for row in good:
            low, high = row["points"].min(0), row["points"].max(0)
            x0, y0, x1, y1 = crop_bounds(row, 32, before.shape)
            touched[y0:y1, x0:x1] = True
            (x0, y0), (x1, y1) = (low.astype(int), high.astype(int))
            patch = np.s_[y0:y1, x0:x1]
            assert shift_between(before[patch], after[patch]) <= 2, (name, row["sample_key"])
            blurred = [gaussian_filter(p[patch].mean(2), 4) for p in (before, after)]
            assert np.abs(blurred[0] - blurred[1]).mean() < 8, (name, row["sample_key"])
        np.testing.assert_array_equal(before[~touched], after[~touched])
        assert (before != after).any()


def crop_bounds(row: dict, side: int, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all that the face's crop covers."""
    (a_re, a_im), (b_re, b_im) = np.reshape(row["face_transform"], (2, 2))
    z = (np.array([0, side, side * 1j, side * (1 + 1j)]) - complex(b_re, b_im)) / complex(
        a_re, a_im
    )
    low = np.floor([z.real.min(), z.imag.min()]).astype(int)
    high = np.ceil([z.real.max(), z.imag.max()]).astype(int)
    return max(low[0], 0), max(low[1], 0), min(high[0], shape[1]), min(high[1], shape[0])


def test_faces_come_back_to_their_places(tmp_path: Path) -> None:
    picture, points = astronaut_square()
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    swapped = np.abs(points - (1, 0))[[1, 0, 2, 4, 3]]
    red = Image.fromarray(np.asarray(picture)[..., [0, 2, 1]])
    check_scenes(tmp_path, [(picture, points), (mirrored, swapped), (red, points)], 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faces_of_200_photographs_come_back_to_their_places(tmp_path: Path, shared: Path) -> None:
    check_scenes(tmp_path, real_squares(shared), 200)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ with every awkward kind of photograph, and run/, their inversions."""
    folder = tmp_path_factory.mktemp("photos")
    photos = folder / "photos"
    (photos / "deep").mkdir(parents=True)
    square = astronaut_square()
    rng = np.random.default_rng(3)
    one, _ = scene([square], rng, (480, 400))
    two, _ = scene([square, square], rng)
    two.save(photos / "deep" / "two.jpg", quality=92, exif=exif_block(), icc_profile=profile())
    one.save(photos / "one.webp", lossless=True, icc_profile=profile())
    one.transpose(Image.Transpose.ROTATE_90).save(photos / "lying.png")
    lying = exif_block(6)
    one.transpose(Image.Transpose.ROTATE_90).save(photos / "told.jpg", quality=95, exif=lying)
    alpha = one.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(one.size))
    alpha.save(photos / "alpha.png")
    one.convert("L").save(photos / "grey.png")
    one.convert("CMYK").save(photos / "cmyk.jpg", quality=95, icc_profile=profile())
    one.quantize(64).save(photos / "palette.gif")
    face = square[0].resize((300, 300))
    face.crop((0, 0, 150, 300)).save(photos / "cut.png")  # through the nose
    face.crop((0, 0, 300, 130)).save(photos / "cut-away.png")  # below the eyes
    Image.fromarray(camera()).save(photos / "profile.png")
    drawing().save(photos / "drawing.png")
    crowd = Image.new("RGB", (20 * 90, 10 * 90), (90, 110, 130))
    for at in range(200):
        crowd.paste(square[0].resize((80, 80)), (at % 20 * 90 + 5, at // 20 * 90 + 5))
    crowd.save(photos / "crowd.png", compress_level=1)
    assert invert(photos, folder / "run") == 0
    return folder


def exif_block(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "A camera"
    return exif


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def drawing() -> Image.Image:
    """What a child would draw."""
    image = Image.new("RGB", (300, 300), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((60, 40, 240, 260), outline="black", width=4)
    for x in (110, 190):
        pen.ellipse((x - 8, 112, x + 8, 128), fill="black")
    pen.arc((100, 150, 200, 220), 20, 160, fill="black", width=4)
    return image


def test_every_kind_of_photograph_has_a_stated_result(several: Path) -> None:
    found = rows(several / "run")
    counts = {}
    for row in found:
        name = row["sample_key"].partition("#")[0]
        counts.setdefault(name, []).append(row["error_kind"])
    one = [None]
    assert {name: kinds for name, kinds in counts.items() if name != "crowd.png"} == {
        "alpha.png": one,
        "cmyk.jpg": one,
        "cut.png": one,
        "cut-away.png": ["align"],
        "deep/two.jpg": [None, None],
        "drawing.png": ["align"],
        "grey.png": one,
        "lying.png": one,
        "one.webp": one,
        "palette.gif": one,
        "profile.png": one,
        "told.jpg": one,
    }
    assert len(counts["crowd.png"]) >= 195
    assert set(counts["crowd.png"]) == {None}
    assert run_app(["verify", str(several / "run")]) == 0
    by_key = {row["sample_key"]: row for row in found}
    assert "mtcnn found no face of 40 pixels or more" in by_key["drawing.png"]["error"]
    # Turned by EXIF: points in the upright photograph. Really turned: points where the face is.
    upright, told, lying = (by_key[f"{n}#0"] for n in ("one.webp", "told.jpg", "lying.png"))
    assert np.abs(upright["points"] - told["points"]).max() < 2
    back = np.stack([480 - lying["points"][:, 1], lying["points"][:, 0]], 1)
    assert np.abs(upright["points"] - back).max() < 2
    assert all(row["face_score"] > 0.9 for row in found if row["status"] == "ok")
    # What can be seen of a face is where it is.
    _, points = astronaut_square()
    seen = by_key["cut.png#0"]["points"][[0, 3]]
    assert np.abs(seen - 300 * points[[0, 3]]).max() < 12
    left, _, nose, *_ = by_key["profile.png#0"]["points"]
    assert left[0] < PROFILE_NOSE[0] - 10  # the eye that can be seen
    assert np.abs(nose - PROFILE_NOSE).max() < 5
    assert read_declared(str(several / "run")).faces


def test_a_hundred_megapixels_are_read_and_more_are_not(tmp_path: Path) -> None:
    photos, (face, points) = tmp_path / "photos", astronaut_square()
    photos.mkdir()
    large = Image.new("RGB", (10_000, 10_000), (90, 110, 130))
    large.paste(face.resize((600, 600)), (7_000, 3_000))
    large.save(photos / "large.jpg")
    Image.new("L", (12_000, 9_000)).save(photos / "larger.png")
    assert invert(photos, tmp_path / "run") == 0
    found, refused = rows(tmp_path / "run")
    assert np.abs(found["points"] - (7_000, 3_000) - 600 * points).max() < 15
    assert refused["error_kind"] == "too_large"
    assert "12000 x 9000 pixels" in refused["error"]


def reopened(path: Path) -> Image.Image:
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.load()
    return image


@pytest.fixture(scope="module")
def composed(several: Path) -> Path:
    out = several / "composed"
    assert compose(several / "run", out) == 0
    return out


def test_composed_files_keep_what_they_were(several: Path, composed: Path) -> None:
    folder = composed / "photos" / "inversion"
    names = {path.relative_to(folder).as_posix() for path in files(folder)}
    same = {"alpha.png", "crowd.png", "cut.png", "deep/two.jpg", "grey.png", "lying.png"}
    same |= {"one.webp", "profile.png", "told.jpg"}
    assert names == same | {"palette.gif.png"}
    for name in same:
        before, after = reopened(several / "photos" / name), reopened(folder / name)
        assert (after.format, after.mode, after.size) == (before.format, before.mode, before.size)
        assert after.info.get("icc_profile") == before.info.get("icc_profile")
        assert dict(after.getexif()) == dict(before.getexif())
        old, new = np.array(before).astype(int), np.array(after).astype(int)
        assert (old != new).any(), name
        corner = np.abs(old - new)[:24, :24].max()
        assert corner <= (UNTOUCHED if after.format == "JPEG" else 0), name
        if name == "alpha.png":
            np.testing.assert_array_equal(old[..., 3], new[..., 3])
    two = reopened(folder / "deep/two.jpg")
    assert two.info["icc_profile"]
    assert two.getexif()[0x010F] == "A camera"
    assert two.quantization == reopened(several / "photos/deep/two.jpg").quantization
    assert run_app(["verify", str(composed)]) == 0


def test_a_photograph_that_cannot_be_composed_is_a_failed_row(composed: Path) -> None:
    sql = "SELECT sample_key, error FROM latents WHERE error_kind = 'compose'"
    (cmyk,) = query(str(composed), sql).to_pylist()
    assert cmyk["sample_key"] == "cmyk.jpg#0"
    assert "a photograph of mode CMYK would change in every pixel" in cmyk["error"]


def test_verify_sees_photographs_that_changed(
    composed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(composed, copy)
    with (copy / "photos/inversion/grey.png").open("ab") as file:
        file.write(b"x")
    (copy / "photos/inversion/told.jpg").unlink()
    assert run_app(["verify", str(copy)]) == 1
    said = capsys.readouterr().out
    assert "photos/inversion/grey.png was changed" in said
    assert "photos/inversion/told.jpg is missing" in said


def test_compose_resumes_and_gives_equal_bytes(
    several: Path, composed: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(composed, again)
    (again / "_SEALED.json").unlink()
    (again / "commits" / "00000.json").unlink()
    (again / "photos/inversion/alpha.png").write_bytes(b"half of it")
    (again / "photos/inversion/crowd.png").unlink()
    assert compose(several / "run", again) == 0
    made, remade = (
        {path.relative_to(run): path.read_bytes() for path in files(run / "photos")}
        for run in (composed, again)
    )
    assert made == remade
    parts, reparts = (
        {shard: marker.parts["latents"].sha256 for shard, marker in read_markers(str(run)).items()}
        for run in (composed, again)
    )
    assert parts == reparts


def test_the_largest_face_alone(several: Path, tmp_path: Path) -> None:
    photos, run = several / "photos" / "deep", tmp_path / "run"
    assert invert(photos, run, "--set", "input.faces=largest") == 0
    (row,) = rows(run)
    assert row["sample_key"] == "two.jpg"
    sizes = {
        r["sample_key"]: r["face_box"][2] - r["face_box"][0]
        for r in rows(several / "run")
        if "two" in r["sample_key"]
    }
    assert row["face_box"][2] - row["face_box"][0] == max(sizes.values()) == sizes["deep/two.jpg#0"]


def test_a_photograph_that_changed_or_went_is_a_failed_row(several: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("grey.png", "lying.png"):
        (photos / name).write_bytes((several / "photos" / name).read_bytes())
    assert invert(photos, tmp_path / "run") == 0
    (photos / "grey.png").write_bytes((photos / "lying.png").read_bytes())
    (photos / "lying.png").unlink()
    assert compose(tmp_path / "run", tmp_path / "out") == 0
    sql = "SELECT error FROM latents ORDER BY sample_key"
    changed, gone = query(str(tmp_path / "out"), sql)["error"].to_pylist()
    assert changed == "the photograph is not the one that was inverted"
    assert "the file is gone" in gone


def test_compose_needs_a_run_that_knows_its_faces(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = tiny_face_config(tmp_path)
    photos = str(several / "photos" / "deep")
    assert run_app(["invert", photos, str(run), "--config", config, *INLINE]) == 0
    assert "1 of 1 pictures do not look aligned" in " ".join(capsys.readouterr().out.split())
    assert "do not look aligned" in (run / "report.html").read_text()
    assert run_app(["diff", str(run), str(run)]) == 0  # a flag is no metric that could drift
    assert query(str(run), "SELECT looks_aligned FROM latents")["looks_aligned"].to_pylist() == [
        False
    ]
    assert compose(run, tmp_path / "out") == 2
    assert "does not say where in their photographs its faces are" in capsys.readouterr().err


def test_a_missing_detector_stops_before_any_work(
    several: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mtcnn, "PACKAGE", "no_such_package_here")
    mtcnn.load_mtcnn.cache_clear()
    assert invert(several / "photos", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "pip install -c constraints.txt 'style-refinery[faces]'" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_generator_without_a_template_is_refused(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["invert", str(several / "photos"), str(tmp_path / "run"), "--align", *INLINE]
    assert run_app([*command, "--set", "generator=hands64"]) == 2
    assert "the generator's card names no template" in capsys.readouterr().err


def test_export(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = str(several / "run"), tmp_path / "files"
    command = ["export", run, str(folder), "--picture", "input"]
    assert run_app(command) == 0
    keys = query(run, "SELECT sample_key FROM latents WHERE status = 'ok'")[
        "sample_key"
    ].to_pylist()
    names = {p.relative_to(folder).as_posix() for p in files(folder) if not p.name.startswith(".")}
    assert names == {f"{key}.png" for key in keys}
    stored = query(run, "SELECT input.bytes AS data FROM images WHERE sample_key = 'grey.png#0'")
    assert (folder / "grey.png#0.png").read_bytes() == stored["data"][0].as_py()
    (folder / "grey.png#0.png").write_bytes(b"half")
    capsys.readouterr()
    assert run_app(command) == 0
    assert (
        f"1 files written to {folder}, {len(keys) - 1} were there already"
        in capsys.readouterr().out
    )
    assert run_app(["export", run, str(folder)]) == 2
    assert "holds another export" in capsys.readouterr().err
    assert run_app(["export", run, str(tmp_path / "b"), "--picture", "oil"]) == 2
    assert "has stored no pictures 'oil', only input, inversion" in capsys.readouterr().err
    both = ["--picture", "input", "--picture", "inversion"]
    assert run_app(["export", run, str(tmp_path / "c"), *both]) == 0
    assert (tmp_path / "c/inversion/deep/two.jpg#1.png").is_file()


def test_a_row_that_is_missing_ends_with_exit_code_1(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts and marker agree with each other, but one of a photograph's two faces is not there."""
    run, lost = tmp_path / "run", "deep/two.jpg#0"
    shutil.copytree(several / "run", run)
    for shard, marker in read_markers(str(run)).items():
        tables = {kind: pq.read_table(run / part.path) for kind, part in marker.parts.items()}
        if lost not in tables["latents"]["sample_key"].to_pylist():
            continue
        parts = {}
        for kind, table in tables.items():
            kept = table.filter(pc.not_equal(table["sample_key"], lost))
            data, part = to_parquet(kept, kind), marker.parts[kind]
            (run / part.path).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            parts[kind] = replace(part, bytes=len(data), sha256=digest, rows=len(kept))
        (run / "commits" / f"{shard:05d}.json").unlink()
        write_marker(str(run), replace(marker, rows=marker.rows - 1, parts=parts))
    (run / "_SEALED.json").unlink()
    assert run_app(["verify", str(run)]) == 1
    assert "1 samples missing (deep/two.jpg)" in capsys.readouterr().out
    assert invert(several / "photos", run) == 1
    assert "1 samples missing (deep/two.jpg)" in " ".join(capsys.readouterr().out.split())


SCORES = "SELECT sample_key, status, error_kind, mse, psnr, ssim FROM latents ORDER BY sample_key"


@pytest.fixture
def by_reference(several: Path, tmp_path: Path) -> Path:
    """A run that has thumbnails of its inputs, and its photographs beside it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("deep/two.jpg", "drawing.png", "grey.png", "told.jpg"):
        shutil.copy(several / "photos" / name, photos)
    pictures = 'output.pictures=["thumbnail", "inversion"]'
    assert invert(photos, tmp_path / "run", "--set", pictures) == 0
    return tmp_path / "run"


def rescore(run: Path, out: Path, *sets: str) -> int:
    flags = [part for item in ("perceptual=none", *sets) for part in ("--set", item)]
    return run_app(["rescore", str(run), str(out), *INLINE, *flags])


def test_inputs_kept_by_reference_are_read_again_to_be_scored(by_reference: Path) -> None:
    out = by_reference.parent / "out"
    assert rescore(by_reference, out) == 0
    found = query(str(out), SCORES)
    assert found["status"].to_pylist() == ["failed", "ok", "ok", "ok", "ok"]
    assert found.equals(query(str(by_reference), SCORES))
    assert run_app(["verify", str(out)]) == 0


def test_a_photograph_that_changed_is_not_scored(by_reference: Path) -> None:
    shutil.copy(by_reference.parent / "photos/told.jpg", by_reference.parent / "photos/grey.png")
    out = by_reference.parent / "out"
    assert rescore(by_reference, out) == 0
    sql = "SELECT error FROM latents WHERE sample_key = 'grey.png#0'"
    (row,) = query(str(out), sql).to_pylist()
    assert row["error"] == "the photograph is not the one that was inverted"
    kept = "SELECT sample_key, psnr FROM latents WHERE psnr > 0 AND sample_key != 'grey.png#0'"
    assert query(str(out), kept).equals(query(str(by_reference), kept))


def test_another_face_is_not_scored_in_the_place_of_one(
    by_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_other_order(*what: object) -> list[Crop]:
        crops = decode_all(*what)  # type: ignore[arg-type]
        return [replace(c, number=len(crops) - 1 - n) for n, c in enumerate(crops)]

    monkeypatch.setattr("tasks.work.rescore.decode_all", in_other_order)
    out = by_reference.parent / "out"
    assert rescore(by_reference, out) == 0
    sql = (
        "SELECT sample_key, error FROM latents WHERE error_kind = 'align' AND sample_key LIKE 't%'"
    )
    found = {row["sample_key"]: row["error"] for row in query(str(out), sql).to_pylist()}
    assert set(found) == {"two.jpg#0", "two.jpg#1"}
    assert all("the detector finds another face" in error for error in found.values())


def test_a_detector_of_other_weights_is_not_asked_again(
    by_reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mtcnn.load_mtcnn(), "hash", "0" * 64)
    assert rescore(by_reference, by_reference.parent / "out") == 2
    assert "input.detector was" in capsys.readouterr().err
    assert not (by_reference.parent / "out").exists()


def test_inputs_kept_by_reference_are_exported_by_way_of_a_rescore(
    several: Path, by_reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_reference.parent
    assert run_app(["export", str(by_reference), str(folder / "a"), "--picture", "input"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "only thumbnail, inversion; `refinery rescore RUN OUT" in said
    assert rescore(by_reference, folder / "out", 'output.pictures=["input"]') == 0
    assert run_app(["export", str(folder / "out"), str(folder / "b"), "--picture", "input"]) == 0
    stored = query(str(several / "run"), "SELECT sample_key, input.bytes AS data FROM images")
    pictures = {row["sample_key"].rpartition("/")[2]: row["data"] for row in stored.to_pylist()}
    exported = {path.name.removesuffix(".png"): path for path in (folder / "b").glob("*.png")}
    assert set(exported) == {"two.jpg#0", "two.jpg#1", "grey.png#0", "told.jpg#0"}
    assert all(path.read_bytes() == pictures[key] for key, path in exported.items())
    assert run_app(["export", str(by_reference), str(folder / "c"), "--picture", "thumbnail"]) == 0
    assert reopened(folder / "c/told.jpg#0.jpg").size == (32, 32)


def test_a_compacted_run_is_composed_whole(several: Path, composed: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(several / "run", run)
    assert run_app(["compact", str(run)]) == 0
    assert compose(run, out) == 0
    made, remade = (
        {path.relative_to(run): path.read_bytes() for path in files(run / "photos")}
        for run in (composed, out)
    )
    assert made == remade


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/photos.md from its first to its last command, on the photograph that it shows."""
    page = (Path(__file__).parents[2] / "docs" / "photos.md").read_text()
    block = page.partition("```sh\n")[2].partition("```")[0]
    commands = [line.partition("  #")[0] for line in block.splitlines() if "refinery " in line[:9]]
    assert [command.split()[1] for command in commands] == ["invert", "edit", "compose", "export"]
    monkeypatch.chdir(tmp_path)
    write_demo_photograph(Path("photos"))
    for command in commands:
        _, name, *rest = shlex.split(command)
        assert run_app([name, *rest, *([] if name == "export" else INLINE)]) == 0, command
    before = reopened(Path("photos/astronaut.png"))
    after = reopened(Path("runs/photos/photos/age+2/astronaut.png"))
    old, new = np.array(before).astype(int), np.array(after).astype(int)
    face = np.s_[90:150, 195:260]
    assert 2 < np.abs(new - old)[face].mean() < 40
    outside = np.ones(old.shape[:2], bool)
    outside[40:200, 150:300] = False
    np.testing.assert_array_equal(old[outside], new[outside])
    assert reopened(Path("faces/astronaut.png#0.png")).size == (64, 64)

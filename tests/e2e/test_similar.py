"""Similarity through the door: index, similar and duplicates over a small run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from models.losses.clip import load_clip
from models.losses.identity import load_identity
from models.losses.style_space import StyleSpace
from models.statistics import statistics_for
from pipeline.cli import run_app
from tasks.run import vectors
from tasks.run.ledger import read_markers
from tasks.run.query import query
from tasks.similar import Index, open_index
from tasks.similar.duplicates import duplicates, spread
from tasks.similar.index import FETCHED
from tasks.storage.files import list_files, read_bytes, write_bytes
from tasks.work.device import to_images
from tests.conftest import make_tiny_generator
from tests.e2e.small_dataset import Dataset, index_inline, run_inline
from tests.models.losses.test_dlib_face import dat
from tests.processes import wait_for
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server
from tests.tasks.coded_run import write_coded_run
from tests.tasks.work.test_edit import pictures

FLAGS = ["--engine", "inline", "--no-flow"]


@pytest.fixture(scope="module")
def codes() -> dict[str, np.ndarray]:
    """Forty, spread more in some directions than in others; copies of three; of values that half
    precision holds."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((40, 128)) * np.linspace(2, 0.2, 128)
    wide = np.concatenate([wide, wide[:3] + 0.02 * rng.standard_normal((3, 128))])
    return {
        f"face-{number:02d}.png": code.astype(np.float16).astype(np.float32).reshape(8, 16)
        for number, code in enumerate(wide)
    }


@pytest.fixture(scope="module")
def coded(codes: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of them, in shards of ten; the last sample has failed."""
    folder = tmp_path_factory.mktemp("coded")
    samples = [*codes.items(), ("zz-broken.png", None)]
    shards = [dict(samples[at : at + 10]) for at in range(0, len(samples), 10)]
    return write_coded_run(str(folder / "run"), make_tiny_generator(), folder, shards)


@pytest.fixture(scope="module")
def indexed(coded: str) -> str:
    out = f"{coded}-beside"
    assert index_inline(coded, out, "directions=64").is_clean
    return out


def ask(capsys: pytest.CaptureFixture[str], tmp_path: Path, *command: str) -> list[dict]:
    """The answer of a command, as a user's file has it."""
    capsys.readouterr()
    out = tmp_path / "answer.json"
    assert run_app([*command, "--out", str(out)]) == 0, capsys.readouterr().err
    return json.loads(out.read_text())


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a user reads whose command is wrong: one line."""
    capsys.readouterr()
    assert run_app([*command]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error:")
    assert "Traceback" not in err
    assert "\n" not in err
    return err


def nearest(codes: dict[str, np.ndarray], to: np.ndarray, without: str = "") -> dict[str, float]:
    """Distances by key, nearest first."""
    to = to.reshape(8, 16)
    found = {key: float(np.linalg.norm(code - to)) for key, code in codes.items() if key != without}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def test_index_then_similar(
    coded: str, codes: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    shutil.copytree(coded, run)
    assert run_app(["index", run, *FLAGS]) == 0
    assert "44 in 5 shards, 1 failed" in capsys.readouterr().out
    assert run_app(["verify", f"{run}-index"]) == 0
    assert run_app(["index", run, *FLAGS]) == 0
    assert "0 rows in 0:00:00" in capsys.readouterr().out
    key = "face-13.png"
    found = ask(capsys, tmp_path, "similar", run, "--key", key, "-k", "5")
    wanted = nearest(codes, codes[key], key)
    assert [row["sample_key"] for row in found] == list(wanted)[:5]
    assert [row["distance"] for row in found] == pytest.approx(list(wanted.values())[:5], rel=1e-5)
    assert [row["psnr"] for row in found] == [int(row["sample_key"][5:7]) for row in found]
    everyone = ask(capsys, tmp_path, "similar", f"{run}-index", "--key", key, "-k", "99")
    assert [row["sample_key"] for row in everyone] == list(wanted)
    (row,) = ask(capsys, tmp_path, "similar", run, "--key", "face-01.png", "-k", "1")
    assert row["sample_key"] == "face-41.png"


def test_a_filter_comes_first(
    indexed: str, codes: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["similar", indexed, "--key", "face-03.png"]
    found = ask(capsys, tmp_path, *common, "--where", "psnr BETWEEN 17 AND 22")
    kept = {key: code for key, code in codes.items() if 17 <= int(key[5:7]) <= 22}
    wanted = nearest(kept, codes["face-03.png"])
    assert {row["sample_key"]: row["distance"] for row in found} == pytest.approx(wanted, rel=1e-5)
    assert [row["sample_key"] for row in found] == list(wanted)
    assert ask(capsys, tmp_path, *common, "--where", "psnr > 1e9") == []
    people = tmp_path / "people.csv"
    people.write_text("sample_key,age\nface-01.png,70\nface-02.png,30\nface-09.png,65\n")
    found = ask(capsys, tmp_path, *common, "--where", "age > 60", "--table", str(people))
    assert {row["sample_key"]: row["age"] for row in found} == {
        "face-01.png": 70,
        "face-09.png": 65,
    }


def test_a_picture_is_inverted_as_the_run_does(
    dataset: Dataset, calm: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = f"{dataset.source}/face-04.png"
    found = ask(capsys, tmp_path, "similar", calm["index"], "--image", picture)
    by_key = {row["sample_key"]: row["distance"] for row in found}
    assert by_key["face-04.png"] < 0.02
    stored = query(calm["invert"], "SELECT w_plus FROM latents WHERE sample_key = 'face-05.png'")
    code = np.array(stored["w_plus"].to_pylist()[0])
    own = query(calm["invert"], "SELECT w_plus FROM latents WHERE sample_key = 'face-04.png'")
    away = float(np.linalg.norm(code - np.array(own["w_plus"].to_pylist()[0])))
    assert by_key["face-05.png"] == pytest.approx(away, abs=0.02)


def test_a_vector_from_a_file(
    indexed: str,
    codes: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("q.npy", "q.json"):
        path = tmp_path / name
        code = codes["face-06.png"].reshape(8, 16)
        if name == "q.npy":
            np.save(path, code)
        else:
            path.write_text(json.dumps(code.tolist()))
        found = ask(capsys, tmp_path, "similar", indexed, "--vector", str(path), "-k", "3")
        assert found[0]["distance"] == 0.0
        assert found[0]["sample_key"] == "face-06.png"


def test_no_torch_is_loaded_to_answer(indexed: str, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", np.zeros(128))
    ways = (["--key", "face-03.png"], ["--key", "face-03.png", "--where", "psnr > 3"])
    commands = [["similar", indexed, *way] for way in (*ways, ["--vector", f"{tmp_path}/q.npy"])]
    code = (
        "import sys; from pipeline.cli import run_app\n"
        f"assert [run_app(command) for command in {commands!r}] == [0, 0, 0]\n"
        "assert not {'torch', 'pandas', 'ray', 'prefect'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_words_by_clip(
    undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "clip")
    assert run_app(["index", undisturbed, out, "--space", "clip", *FLAGS]) == 0
    text = "photo of a face"
    found = ask(capsys, tmp_path, "similar", undisturbed, "--index", out, "--text", text)
    clip = load_clip()
    stored = pictures(undisturbed)["input"]
    wanted = clip.texts([text])[0]
    device = torch.device("cpu")
    cosines = {
        key: float(clip.images(to_images(pixels.copy()[None], device))[0] @ wanted)
        for key, pixels in stored.items()
    }
    assert [row["sample_key"] for row in found] == sorted(cosines, key=lambda key: -cosines[key])
    for row in found:  # of unit vectors, |a - b|^2 = 2 - 2 cos
        cosine = 1 - row["distance"] ** 2 / 2
        assert cosine == pytest.approx(cosines[row["sample_key"]], abs=2e-3)


def test_other_spaces_of_codes(coded: str, codes: dict[str, np.ndarray], tmp_path: Path) -> None:
    w_plus = torch.from_numpy(codes["face-01.png"])[None]
    generator = make_tiny_generator()
    styles = StyleSpace(generator, statistics_for(generator).style_anchor).normalised(w_plus)
    wanted = {
        "w": w_plus[0].mean(0),
        "style": torch.cat(styles, 1)[0].detach() / len(styles) ** 0.5,
    }
    for space, vector in wanted.items():
        out = str(tmp_path / space)
        assert index_inline(coded, out, f"space={space}").is_clean
        index = open_index(out, coded)
        assert index.vectors(["face-01.png"])[0] == pytest.approx(vector.numpy(), abs=2e-3)
        (found,) = index.search(index.vectors(["face-01.png"]), 2)
        assert found["sample_key"].to_pylist() == ["face-01.png", "face-41.png"]


def test_mirrored_pictures_are_near_in_the_perceptual_space(
    undisturbed: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    index_inline(undisturbed, out, "space=perceptual", "perceptual=refinery")
    index = open_index(out)
    from tasks.work.spaces import PictureSpace

    pixels = pictures(undisturbed)["input"]["face-05.png"][:, ::-1].copy()
    mirrored = PictureSpace("perceptual", "refinery")(to_images(pixels[None], torch.device("cpu")))
    (found,) = index.search(mirrored.numpy(), 1)
    assert found["sample_key"].to_pylist() == ["face-05.png"]
    assert found["distance"][0].as_py() < 0.01


def test_a_face_network_by_a_file(
    undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "face.dat").write_bytes(dat()[0])
    out, network = str(tmp_path / "out"), f"identity={tmp_path}/face.dat"
    assert (
        run_app(["index", undisturbed, out, "--space", "identity", "--set", network, *FLAGS]) == 0
    )
    stored = pictures(undisturbed)["input"]
    identity = load_identity(tmp_path / "face.dat")
    embedded = {
        key: identity.features(to_images(pixels.copy()[None], torch.device("cpu")))[0].numpy()
        for key, pixels in stored.items()
    }
    found = ask(capsys, tmp_path, "similar", out, "--key", "face-05.png", "-k", "99")
    apart = {key: np.linalg.norm(each - embedded["face-05.png"]) for key, each in embedded.items()}
    assert {row["sample_key"] for row in found} == apart.keys() - {"face-05.png"}
    for row in found:
        assert row["distance"] == pytest.approx(apart[row["sample_key"]], abs=2e-3)


def test_duplicates(
    coded: str, indexed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ask(capsys, tmp_path, "duplicates", coded, "--index", indexed)
    groups: dict[int, set[str]] = {}
    for row in found:
        groups.setdefault(row["group"], set()).add(row["sample_key"])
        assert 0 < row["distance"] < 0.5
    assert sorted(map(sorted, groups.values())) == [
        [f"face-{n:02d}.png", f"face-{n + 40:02d}.png"] for n in range(3)
    ]
    assert sorted(groups) == [1, 2, 3]
    nothing = ["duplicates", coded, "--index", indexed, "--threshold", "0.0001"]
    assert ask(capsys, tmp_path, *nothing) == []
    assert "expected a share between 0 and 1" in refused(
        capsys, "duplicates", coded, "--index", indexed, "--threshold", "2"
    )


def test_duplicates_by_lists_are_those_of_all_pairs(
    indexed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(indexed)
    wanted = duplicates(index, 0.95)
    assert wanted.num_rows > 12
    monkeypatch.setattr("tasks.similar.duplicates.ALL_PAIRS", 4)
    assert duplicates(index, 0.95).equals(wanted)


def test_the_spread_is_a_typical_distance(indexed: str, codes: dict[str, np.ndarray]) -> None:
    every = np.stack([code.reshape(-1) for code in codes.values()])
    apart = np.linalg.norm(every[:, None] - every, axis=2)[np.triu_indices(len(every), 1)]
    assert spread(open_index(indexed)) == pytest.approx(np.median(apart), rel=0.03)


def test_bad_questions_are_one_line(
    coded: str,
    indexed: str,
    calm: dict[str, str],
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["similar", coded, "--index", indexed]
    broken = f"{dataset.source}/zz-broken.png"
    for command, wanted in (
        ([*common, "--key", "face-3.png"], "did you mean 'face-03.png'?"),
        ([*common, "--key", "05.png"], "did you mean 'face-05.png'?"),
        ([*common, "--key", "face-03.png", "--where", "psnrr > 3"], "did you mean 'psnr'?"),
        ([*common, "--key", "zz-broken.png"], "has no sample 'zz-broken.png' with a vector"),
        ([*common], "expected one of --image, --key, --text, --vector, found none"),
        ([*common, "--key", "a", "--text", "b"], "found --key and --text"),
        ([*common, "--key", "face-03.png", "-k", "0"], "k is 0; expected at least 1"),
        (
            [*common, "--key", "face-03.png", "--where", "age > 3"],
            "columns: sample_key, psnr, nscd",
        ),
        ([*common, "--key", "face-03.png", "--where", "psnr >"], "syntax error"),
        ([*common, "--key", "face-03.png", "--where", "1; FROM x"], "where '1; FROM x'"),
        (["similar", calm["index"], "--image", broken], f"query picture {broken}: "),
        ([*common, "--image", f"{tmp_path}/none.png"], "there is no such file"),
        ([*common, "--text", "smile"], "space w_plus, not clip"),
        ([*common, "--key", "face-03.png", "--table", "x.txt"], "expected a file ending in .csv"),
        (["similar", coded, "--key", "a"], f"`refinery index {coded}`"),
        (["similar", coded, "--text", "a"], f"`refinery index {coded} --space clip`"),
        (["similar", coded, "--index", coded, "--key", "a"], "is a run, not an index"),
        (["similar", str(tmp_path), "--key", "a"], "no run here"),
        (["similar", coded[:-1], "--key", "a"], f"did you mean {coded}?"),
        ([*common, "--key", "a:x:b"], "no sample 'a:x:b' with"),
        ([*common, "--key", "face-03.png", "--where", " "], "the condition is empty"),
        (["index", calm["edit"], str(tmp_path / "x"), *FLAGS], "start from that one"),
        (["index", coded, "--space", "identity", *FLAGS], "needs a face network"),
        (["index", coded, "--space", "clip", *FLAGS], "has stored no pictures, only codes"),
        (
            ["index", coded, "--set", 'output.pictures=["input"]', *FLAGS],
            "copies none, found input",
        ),
    ):
        assert wanted in refused(capsys, *command)
    np.save(tmp_path / "short.npy", np.zeros(7))
    short = ["--vector", str(tmp_path / "short.npy")]
    np.save(tmp_path / "wide.npy", np.full(128, 1e300))
    wide = ["--vector", str(tmp_path / "wide.npy")]
    assert "not finite" in refused(capsys, *common, *wide)
    assert "it has 7 values" in refused(capsys, *common, *short)
    (tmp_path / "twice.csv").write_text("sample_key,age\na,1\na,2\n")
    twice = ["--key", "face-03.png", "--table", str(tmp_path / "twice.csv")]
    assert "a sample_key is there twice" in refused(capsys, *common, *twice)
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    assert "cannot be read" in refused(capsys, *common, "--vector", str(tmp_path / "bad.npy"))


def test_an_index_of_another_run_or_generator_is_refused(
    dataset: Dataset, indexed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "other")
    run_inline(dataset, other, "seed=5")
    message = refused(capsys, "similar", other, "--index", indexed, "--key", "face-03.png")
    assert "is an index of run" in message
    record = json.loads(Path(other, "run.json").read_text())
    record["weights"]["generator"] = "0" * 64
    Path(other, "run.json").write_text(json.dumps(record))
    message = refused(capsys, "similar", other, "--index", indexed, "--key", "face-03.png")
    assert "codes of another generator" in message


def test_a_missing_scan_file_is_named(indexed: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(indexed, copy)
    part = next((copy / "vectors").glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-50])
    assert run_app(["verify", str(copy)]) == 1
    assert run_app(["similar", str(copy), "--key", "face-03.png"]) == 2


def test_a_new_shard_is_one_more_file(indexed: str, tmp_path: Path) -> None:
    """What is committed is searched, while the index is being made."""
    copy = tmp_path / "copy"
    shutil.copytree(indexed, copy)
    later = copy / "commits" / "00002.json"
    held = later.rename(tmp_path / "held.json")
    before = open_index(str(copy))
    held.rename(later)
    after = open_index(str(copy))
    assert len(after) == len(before) + 10 == 43
    (found,) = after.search(after.vectors(["face-24.png"]), 1)
    assert found["sample_key"].to_pylist() == ["face-24.png"]


def test_object_storage(
    s3: str,
    s3_server: S3Server,
    coded: str,
    indexed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests and bytes of a first answer, of the next one, and of the next process."""
    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path / "cache"))
    out = f"{s3}/index"
    index_inline(coded, out, "directions=64")
    local = open_index(indexed)
    assert [m.parts["vectors"].sha256 for m in read_markers(out).values() if m.failed < m.rows] == [
        m.parts["vectors"].sha256 for m in read_markers(indexed).values() if m.failed < m.rows
    ]
    sizes = {name: size for name, size, _ in list_files(out)}
    with s3_proxy(s3_server.endpoint) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        remote = open_index(out)
        assert not [path for path in store.paths if "/vectors/" in path or "/exact/" in path]
        # run.json by who checks it and by who reads the run, the projection, the metadata file.
        assert store.requests["GET"] <= 5
        assert store.requests.total() <= 10
        assert store.bytes < 3 * sum(sizes[n] for n in sizes if "metadata" in n or "proj" in n)
        store.forget()
        assert answer(remote) == answer(local)
        # All candidates of a part lie together: one read of each, after that of the vector.
        assert store.requests == {"GET": 1 + 5}
        assert all("/exact/" in path for path in store.paths)
        store.forget()
        with monkeypatch.context() as apart:
            apart.setattr(vectors, "GAP_BYTES", 0)  # as those of a large index lie
            assert answer(remote) == answer(local)
        assert store.requests == {"GET": 1 + FETCHED + 1}, "its vector, candidates and itself"
        store.forget()
        (found,) = remote.search(local.vectors(["face-03.png"]), 3, "psnr > 30")
        assert found.equals(local.search(local.vectors(["face-03.png"]), 3, "psnr > 30")[0])
        assert all("/exact/" in path for path in store.paths)
        assert remote.search(local.vectors(["face-03.png"]), 3, "psnr > 99")[0].num_rows == 0
        wait_for(lambda: list((tmp_path / "cache").rglob("*.arrow")), 60, "the kept rows")
        (metadata,) = [name for name in sizes if name.startswith("metadata/")]
        store.forget()
        again = open_index(out)
        # Of the metadata file its end alone, which holds the markers.
        assert [path for path in store.paths if metadata in path][1:] == []
        assert answer(again) == answer(local)
        store.breaks_off["/exact/"] = 3
        assert answer(again) == answer(local)
        assert np.array_equal(remote.codes(7, 23), local.codes(7, 23))
        assert duplicates(remote).equals(duplicates(local))


def test_an_index_that_grows_on_an_object_store(
    s3: str, indexed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of no metadata file are read from their parts, and a file without sketches, of an
    earlier version, is left alone."""
    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path / "cache"))
    files = {name: read_bytes(f"{indexed}/{name}") for name, _, _ in list_files(indexed)}
    (metadata,) = [name for name in files if name.startswith("metadata/")]
    without = pq.ParquetFile(f"{indexed}/{metadata}")
    footer = {k: v for k, v in without.metadata.metadata.items() if k != b"ARROW:schema"}
    earlier = without.read().drop_columns("sketch").replace_schema_metadata(footer)
    pq.write_table(earlier, tmp_path / "earlier.parquet", store_schema=False)
    data = (tmp_path / "earlier.parquet").read_bytes()
    for place, left_out, held in (
        ("fresh", {metadata}, {}),
        ("older", {metadata}, {metadata: data}),
        ("grown", {"commits/00002.json"}, {}),
    ):
        for name, content in {**files, **held}.items():
            if name not in left_out or name in held:
                write_bytes(f"{s3}/{place}/{name}", content)
    local = open_index(indexed)
    assert answer(open_index(f"{s3}/fresh")) == answer(local)
    assert answer(open_index(f"{s3}/older")) == answer(local)
    before = open_index(f"{s3}/grown")
    write_bytes(f"{s3}/grown/commits/00002.json", files["commits/00002.json"])
    after = open_index(f"{s3}/grown")
    assert len(after) == len(before) + 10 == 43
    assert answer(after) == answer(local)
    assert "face-24.png" not in str(before.search(local.vectors(["face-24.png"]), 43))


def answer(index: Index) -> list[tuple[str, float]]:
    (found,) = index.search(index.vectors(["face-03.png"]), 5, leave_out=["face-03.png"])
    rows = found.to_pylist()
    return [(row["sample_key"], round(row["distance"], 4)) for row in rows]


def test_a_run_and_its_index_differ_in_no_score(
    coded: str, indexed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index is a run whose rows hold no codes to compare."""
    capsys.readouterr()
    assert run_app(["diff", coded, indexed]) == 0
    shown = capsys.readouterr().out
    assert "psnr" in shown
    assert "w_plus" not in shown


def test_codes_are_of_the_parts(indexed: str) -> None:
    index = open_index(indexed)
    vectors = index.take(np.arange(7, 23))
    assert np.array_equal(index.codes(7, 23), index.projection.encode(vectors)["code"])
    marker = read_markers(indexed)[0]
    latents = pq.read_table(f"{indexed}/{marker.parts['latents'].path}")
    assert latents["w_plus"].null_count == latents.num_rows
    rows = query(indexed, "SELECT sample_key, w_plus, psnr FROM latents ORDER BY 1").to_pylist()
    assert [row["psnr"] for row in rows] == [*range(43), None]
    assert {row["w_plus"] is None for row in rows} == {True}

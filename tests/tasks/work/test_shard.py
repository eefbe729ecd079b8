"""The heart: rows, bytes, crashes, commits."""

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.errors import ShardError
from models.inversion.base import sample_seed
from models.stylegan2.generator import Generator
from tasks.input.sample import CorruptFileError
from tasks.job import InputConfig, JobConfig
from tasks.run.ledger import pending, read_marker, remove_orphans, seal
from tasks.run.marker import Marker
from tasks.storage.crash import EXIT_CODE, POINTS, VARIABLE
from tasks.storage.files import list_files, read_bytes
from tasks.verify.run import verify
from tasks.work import attempt
from tasks.work import invert as inverting
from tasks.work import shard as heart
from tasks.work.invert import Inverter
from tasks.work.station import Batch, Result
from tests.tasks.small_run import (
    BROKEN,
    SmallRun,
    begin,
    make_job,
    make_noise_job,
    part_bytes,
    write_picture_table,
    write_pictures,
)


@pytest.fixture
def inverter(job: JobConfig) -> Inverter:
    return Inverter(job, "cpu")


@pytest.fixture
def pictures(tmp_path: Path, face_bytes: list[bytes]) -> str:
    return str(write_pictures(tmp_path / "in", face_bytes))


@pytest.fixture
def small(tmp_path: Path, pictures: str, job: JobConfig, inverter: Inverter) -> SmallRun:
    """Eight pictures and a broken file in two shards, of 5 and 4 samples."""
    return begin(str(tmp_path / "out"), pictures, job, inverter)


def read_part(run: SmallRun, shard: int, kind: str) -> list[dict]:
    marker = read_marker(run.uri, shard)
    assert marker is not None
    return pq.read_table(f"{run.uri}/{marker.parts[kind].path}").to_pylist()


def decoded(struct: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(struct["bytes"])))


def test_every_sample_is_a_row(small: SmallRun, face_bytes: list[bytes]) -> None:
    first, second = small.run(0), small.run(1)
    assert (first.rows, first.failed, second.rows, second.failed) == (5, 0, 4, 1)
    assert second.failures == {"decode": 1}
    rows = read_part(small, 0, "latents") + read_part(small, 1, "latents")
    assert [row["sample_key"] for row in rows] == [f"face-{i}.png" for i in range(8)] + ["zz-0.png"]
    assert [row["status"] for row in rows] == ["ok"] * 8 + ["failed"]
    for row, data in zip(rows, [*face_bytes, BROKEN], strict=True):
        assert row["image_sha256"] == hashlib.sha256(data).hexdigest()
        assert row["image_uri"].endswith(f"/in/{row['sample_key']}")
        assert row["seed"] == sample_seed(0, row["sample_key"])
        assert (row["run_id"], row["method"]) == (small.handle.run_id, "wplus")
    failed = rows[-1]
    assert failed["error_kind"] == "decode"
    assert failed["error"]
    assert [failed[name] for name in ("w_plus", "mse", "psnr", "ssim")] == [None] * 4
    assert [row["sample_key"] for row in read_part(small, 1, "images")] == [
        f"face-{i}.png" for i in (5, 6, 7)
    ]


def test_codes_render_the_stored_picture_and_scores_are_of_it(small: SmallRun) -> None:
    small.run(0)
    rows, images = read_part(small, 0, "latents"), read_part(small, 0, "images")
    generator = small.inverter.generator
    codes = torch.tensor([row["w_plus"] for row in rows]).reshape(5, generator.num_ws, -1)
    assert codes.std(0).min() > 0  # every picture has its own
    rendered = generator.synthesis(codes).permute(0, 2, 3, 1).numpy()
    for row, image, again in zip(rows, images, rendered, strict=True):
        target, found = decoded(image["input"]) / 127.5 - 1, decoded(image["inversion"]) / 127.5 - 1
        assert found.shape == (32, 32, 3)
        assert np.abs(found - again.clip(-1, 1)).max() < 0.5 / 127.5 + 1e-5
        mse = np.square(target - found).mean()
        assert row["mse"] == pytest.approx(mse, rel=1e-5)
        assert row["psnr"] == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
        assert -1 <= row["ssim"] <= 1


def test_marker_says_what_was_done(small: SmallRun) -> None:
    marker = small.run(1)
    assert marker == read_marker(small.uri, 1)
    assert marker.run_id == small.handle.run_id
    assert set(marker.seconds) == {"read", "decode", "invert", "score", "write"}
    assert all(value > 0 for value in marker.seconds.values())
    assert marker.wall_s >= max(marker.seconds.values())
    assert (marker.device, marker.code_version, marker.notes) == ("cpu", "1.2.3", ())
    assert marker.started_at < marker.finished_at
    for kind, part in marker.parts.items():
        data = Path(small.uri, part.path).read_bytes()
        assert part.path == f"{kind}/00001-{marker.attempt}.parquet"
        assert (part.bytes, part.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_bytes_do_not_depend_on_attempt_thread_count_or_lock(
    small: SmallRun, tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.finish()
    first = part_bytes(Path(small.uri))
    before = torch.get_num_threads()
    monkeypatch.setattr(heart, "POOL_THREADS", 1)
    torch.set_num_threads(3)
    try:
        again = begin(str(tmp_path / "again"), pictures, small.job, Inverter(small.job, "cpu"))
        for shard in (1, 0):
            again.run(shard, lock=threading.Lock())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert part_bytes(Path(again.uri)) == first
    assert set(first) == {f"{kind}/0000{n}" for kind in ("latents", "images") for n in (0, 1)}


def test_object_store_holds_the_same_bytes(small: SmallRun, pictures: str, s3: str) -> None:
    small.finish()
    remote = begin(f"{s3}/runs/a", pictures, small.job, small.inverter).finish()
    assert remote.handle.run_id == small.handle.run_id
    assert pending(remote.uri) == []
    for kind in ("latents", "images"):
        found = {
            name.split("-")[0]: read_bytes(f"{remote.uri}/{kind}/{name}")
            for name, _, _ in list_files(f"{remote.uri}/{kind}")
        }
        for path in Path(small.uri, kind).iterdir():
            assert found.pop(path.name.split("-")[0]) == path.read_bytes()
        assert not found


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_then_run_again(
    point: str, small: SmallRun, tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = begin(str(tmp_path / "calm"), pictures, small.job, small.inverter).finish()
    monkeypatch.setenv(VARIABLE, f"{point}:1:{tmp_path / 'token'}")
    small.run(0)
    child = os.fork()
    if child == 0:  # the process that dies
        try:
            small.run(1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_CODE
    assert pending(small.uri) == ([] if point == "after_marker" else [1])
    left_behind = len(list(Path(small.uri, "latents").glob("00001-*")))
    assert left_behind == (point in ("between_parts", "before_marker", "after_marker"))
    small.finish()
    seal(small.uri)
    removed = remove_orphans(small.uri)
    assert [path.split("/")[0] for path in removed] == {
        "between_parts": ["latents"],
        "before_marker": ["latents", "images"],
    }.get(point, [])
    assert part_bytes(Path(small.uri)) == part_bytes(Path(calm.uri))


class RecordingLock:
    """Knows which thread has it."""

    def __init__(self) -> None:
        self.taken, self.holder = 0, 0

    @property
    def held(self) -> bool:
        return self.holder == threading.get_ident()

    def __enter__(self) -> None:
        self.taken, self.holder = self.taken + 1, threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self.holder = 0


def test_lock_is_held_for_the_device_only(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, seen = RecordingLock(), dict[str, set[bool]]()

    def spy(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args, **options):
            seen.setdefault(name, set()).add(lock.held)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    spy(heart, "fill_row")
    spy(inverting, "read_shard")
    spy(small.inverter, "decode")
    for name in ("write_parts", "write_marker"):
        spy(attempt, name)
    spy(small.inverter, "work")
    small.run(0, lock=lock)
    assert lock.taken == 2  # five pictures, batches of three
    assert seen.pop("work") == {True}
    assert set(map(frozenset, seen.values())) == {frozenset({False})}


def test_a_batch_is_read_and_another_written_while_one_is_computed(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = {name: threading.Event() for name in ("decode 5", "work 2")}
    calls: list[str] = []

    def after(owner: object, name: str, awaited: str, until: int) -> None:
        """The first `until` calls return when something else has happened."""
        original = getattr(owner, name)

        def call(*args, **options):
            calls.append(name)  # in several threads
            count = calls.count(name)
            happened.get(f"{name} {count}", threading.Event()).set()
            if count <= until:
                assert happened[awaited].wait(120), f"{name} waits for {awaited}"
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    after(small.inverter, "decode", "", 0)
    after(small.inverter, "work", "decode 5", 1)  # batches of three: the second one is read
    after(heart, "fill_row", "work 2", 1)
    told: list[int] = []
    assert small.run(0, on_rows=told.append).rows == 5
    assert told == [3, 5]


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def failing(what: Callable[[int], object]) -> Iterator[object]:
        yield what(1)
        yield what(2)
        raise KeyError("third")

    def failing_call() -> int:
        raise KeyError("a call")

    items, found = heart.ahead(failing(lambda n: n)), []
    with pytest.raises(KeyError, match="third"):
        found.extend(items)
    assert found == [1, 2]
    found = []
    with pytest.raises(KeyError, match="a call"):
        found.extend(heart.behind(iter([lambda: 1, failing_call, lambda: 3])))
    assert found == [1]
    assert list(heart.ahead(iter([None, 0, ""]))) == [None, 0, ""]
    assert list(heart.behind(iter(()))) == []


def test_batches_are_full_although_pictures_fail(
    tmp_path: Path, job: JobConfig, inverter: Inverter, face_bytes: list[bytes]
) -> None:
    data = [face_bytes[0], None, face_bytes[1], BROKEN, *face_bytes[2:6], BROKEN]
    table = write_picture_table(tmp_path / "in.parquet", data, [f"k{i}" for i in range(9)])
    sizes = []
    original = inverter.work
    inverter.work = lambda batch: (sizes.append(len(batch)), original(batch))[1]
    run = begin(str(tmp_path / "out"), str(table), job, inverter, shard_size=20)
    marker = run.run(0)
    assert sizes == [3, 3]
    assert (marker.rows, marker.failed, marker.failures) == (9, 3, {"decode": 2, "read": 1})
    rows = read_part(run, 0, "latents")
    assert [row["sample_key"] for row in rows] == [f"in.parquet:{i}" for i in range(9)]
    assert rows[1]["image_sha256"] is None
    assert rows[2]["image_uri"] == f"{table}#row=2"


def test_keys_from_a_column_sort_the_parts(
    tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    job = make_job(tiny_generator, tmp_path, input=InputConfig(key_column="id"))
    table = write_picture_table(tmp_path / "in.parquet", face_bytes[:3], ["c", "a", "b"])
    run = begin(str(tmp_path / "out"), str(table), job, Inverter(job, "cpu"))
    run.run(0)
    rows = read_part(run, 0, "latents")
    assert [(row["sample_key"], row["image_uri"][-6:]) for row in rows] == [
        ("a", "#row=1"),
        ("b", "#row=2"),
        ("c", "#row=0"),
    ]
    assert rows[2]["image_sha256"] == hashlib.sha256(face_bytes[0]).hexdigest()


def test_nothing_but_broken_files(tmp_path: Path, job: JobConfig, inverter: Inverter) -> None:
    folder = write_pictures(tmp_path / "in", [], broken=2)
    run = begin(str(tmp_path / "out"), str(folder), job, inverter)
    marker = run.run(0)
    assert (marker.rows, marker.failed, list(marker.parts)) == (2, 2, ["latents"])


def test_a_diverged_picture_is_a_failed_row(small: SmallRun) -> None:
    original = small.inverter.work

    def work(batch: Batch) -> Result:
        found = original(batch)
        if "face-1.png" in batch.keys:
            at = batch.keys.index("face-1.png")
            found.failures[at] = ("diverged", "step 7 <Adam object at 0x7f3a>")
        return found

    small.inverter.work = work  # type: ignore[method-assign]
    marker = small.run(0)
    assert marker.failures == {"diverged": 1}
    row = read_part(small, 0, "latents")[1]
    # Addresses differ from run to run and must not reach the bytes.
    assert (row["error_kind"], row["error"]) == ("diverged", "step 7 <Adam object>")
    assert row["w_plus"] is None
    assert len(read_part(small, 0, "images")) == 4


def test_noise_maps_are_stored_and_render_the_picture(
    tmp_path: Path, tiny_generator: Generator, pictures: str
) -> None:
    job = make_noise_job(tiny_generator, tmp_path, pictures=("inversion",))
    run = begin(str(tmp_path / "out"), pictures, job, Inverter(job, "cpu"))
    run.run(0)
    rows, images = read_part(run, 0, "latents"), read_part(run, 0, "images")
    table = pq.read_table(f"{run.uri}/{read_marker(run.uri, 0).parts['residuals'].path}")
    generator = run.inverter.generator
    sizes = [generator.conv_resolution(i) for i in range(generator.num_convs)]
    noise = [
        torch.tensor(table[f"noise_{i}"].to_pylist()).float().reshape(5, 1, size, size)
        for i, size in enumerate(sizes)
    ]
    assert table.schema.field("noise_3").metadata == {b"shape": b"[1, 16, 16]"}
    codes = torch.tensor([row["w_plus"] for row in rows]).reshape(5, generator.num_ws, -1)
    rendered = generator.synthesis(codes, noise).permute(0, 2, 3, 1).numpy()
    plain = generator.synthesis(codes).permute(0, 2, 3, 1).numpy()
    stored = np.stack([decoded(image["inversion"]) / 127.5 - 1 for image in images])
    assert np.abs(stored - rendered.clip(-1, 1)).max() < 1.5 / 127.5
    assert np.abs(stored - plain.clip(-1, 1)).max() > 2 / 127.5  # the maps matter
    assert list(images[0]) == ["sample_key", "inversion"]


def test_a_corrupt_tar_ends_the_attempt_and_shows_nothing(
    tmp_path: Path, job: JobConfig, inverter: Inverter, face_bytes: list[bytes]
) -> None:
    path = tmp_path / "in.tar"
    with tarfile.open(path, "w") as tar:
        for index, data in enumerate(face_bytes):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    run = begin(str(tmp_path / "out"), str(path), job, inverter)
    with pytest.raises(ShardError, match=r"in\.tar is corrupt") as caught:
        run.run(0)
    assert caught.value.__notes__ == [f"shard=00000 kind=tar uri={path}"]
    assert pending(run.uri) == [0]
    assert part_bytes(Path(run.uri)) == {}


def test_a_late_marker_does_not_land_on_a_commit(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B has seen no commit and its marker is slow; A commits, seals and cleans up meanwhile."""
    write, first = attempt.write_marker, list[Marker]()

    def slow_write(*late: Any) -> Marker:
        monkeypatch.setattr(attempt, "write_marker", write)
        first.append(small.run(0))
        small.run(1)
        seal(small.uri)
        assert len(remove_orphans(small.uri)) == 2
        return write(*late)

    monkeypatch.setattr(attempt, "write_marker", slow_write)
    assert small.run(0) == first[0] == read_marker(small.uri, 0)
    assert pending(small.uri) == []
    assert verify(small.uri).problems == []


def test_a_committed_shard_is_not_done_again(small: SmallRun) -> None:
    first = small.run(0)
    assert small.run(0) == first
    assert len(list(Path(small.uri, "latents").glob("00000*"))) == 1


def test_results_beyond_the_memory_of_a_worker_end_the_shard(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small.run(0)
    monkeypatch.setattr(heart, "MOST_BYTES", 2000)
    with pytest.raises(CorruptFileError, match=r"the first \d samples have \d+ bytes of results"):
        small.run(1)
    assert small.run(0) == whole  # committed already

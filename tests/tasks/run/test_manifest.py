"""Planning and the manifest: what becomes a shard, identity, limits, a million keys."""

import io
import resource
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ConfigError, LedgerError
from tasks.input.footers import row_ranges
from tasks.job import InputConfig, ShardSpec
from tasks.run.manifest import (
    describe_manifest,
    plan_shards,
    read_manifest,
    read_shard_spec,
    write_manifest,
)
from tasks.storage import files as storage


def write_parquet(path: Path, keys: list[object], group: int = 4, column: str = "image") -> None:
    """A Parquet file with one 10-byte picture a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": keys, column: [b"0123456789"] * len(keys)})
    pq.write_table(table, path, row_group_size=group)


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))


def keys(count: int) -> Iterator[tuple[str, int, str]]:
    """The listing of a bucket with many loose pictures."""
    for index in range(count):
        yield f"{index // 1000:04d}/picture-{index:08d}.jpg", 50_000 + index % 7, f"{index:032x}"


def test_loose_pictures_become_shards_of_the_asked_size(tmp_path: Path) -> None:
    names = ["a.PNG", "b/c.jpeg", "b/d.webp", "e.tif", "f.jpg"]
    for name in [*names, "notes.txt", ".hidden.png", "b/._c.jpeg", ".cache/x.png", "._f.jpg"]:
        storage.write_bytes(str(tmp_path / name), name.encode())
    plan = list(plan_shards(str(tmp_path), 2))
    assert [spec.members for spec in plan] == [
        ("a.PNG", "b/c.jpeg"),
        ("b/d.webp", "e.tif"),
        ("f.jpg",),
    ]
    assert [spec.id for spec in plan] == [0, 1, 2]
    assert {spec.kind for spec in plan} == {"files"}
    assert {spec.uri for spec in plan} == {str(tmp_path)}
    assert [spec.num_samples for spec in plan] == [2, 2, 1]
    assert [spec.num_bytes for spec in plan] == [13, 13, 5]
    assert len({spec.etag for spec in plan}) == 3


def test_etag_follows_the_content(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a.png"), b"one")
    before = next(plan_shards(str(tmp_path), 2)).etag
    assert next(plan_shards(str(tmp_path), 2)).etag == before
    storage.write_bytes(str(tmp_path / "a.png"), b"two")
    assert next(plan_shards(str(tmp_path), 2)).etag != before


@pytest.mark.parametrize(
    ("groups", "size", "expected"),
    [
        ([4, 4, 4], 8, [(0, 8), (8, 12)]),
        ([4, 4, 4], 9, [(0, 8), (8, 12)]),
        ([4, 4, 4], 4, [(0, 4), (4, 8), (8, 12)]),
        ([4, 4, 4], 100, [(0, 12)]),
        ([10], 4, [(0, 3), (3, 6), (6, 10)]),
        ([2, 10, 2], 5, [(0, 2), (2, 7), (7, 12), (12, 14)]),
        ([], 5, []),
        ([0, 3], 5, [(0, 3)]),
    ],
)
def test_row_ranges(groups: list[int], size: int, expected: list[tuple[int, int]]) -> None:
    assert list(row_ranges(groups, size)) == expected


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(range(10)))
    plan = list(plan_shards(str(tmp_path), 8))
    assert [(spec.row_start, spec.row_stop, spec.num_samples) for spec in plan] == [
        (0, 8, 8),
        (8, 10, 2),
    ]
    assert {spec.uri for spec in plan} == {str(tmp_path / "a.parquet")}
    assert {spec.members for spec in plan} == {("a.parquet",)}
    assert sum(spec.num_bytes for spec in plan) > 100
    assert plan[0].etag != plan[1].etag


def test_mixed_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "sub" / "a.parquet", [1, 2, 3])
    write_tar(tmp_path / "b.tar", ["1.png", "2.png"])
    storage.write_bytes(str(tmp_path / "c.png"), b"x")
    storage.write_bytes(str(tmp_path / "z.png"), b"x")
    plan = list(plan_shards(str(tmp_path), 10))
    assert [(s.kind, s.members, s.num_samples) for s in plan] == [
        ("tar", ("b.tar",), -1),
        ("parquet", ("sub/a.parquet",), 3),
        ("files", ("c.png", "z.png"), 2),
    ]
    info = write_manifest(str(tmp_path / "run"), plan)
    assert (info.num_shards, info.num_samples) == (3, None)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_single_file_is_an_input(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if kind == "local" else request.getfixturevalue("s3") + "/in"
    write_parquet(tmp_path / "p" / "a.parquet", [1, 2])
    write_tar(tmp_path / "p" / "b.tgz", [])
    for name in ("a.parquet", "b.tgz"):
        storage.write_bytes(f"{root}/{name}", (tmp_path / "p" / name).read_bytes())
    storage.write_bytes(f"{root}/c.jpg", b"x")
    found = [next(plan_shards(f"{root}/{name}", 5)) for name in ("a.parquet", "b.tgz", "c.jpg")]
    assert [(s.kind, s.uri, s.members) for s in found] == [
        ("parquet", f"{root}/a.parquet", ("a.parquet",)),
        ("tar", f"{root}/b.tgz", ("b.tgz",)),
        ("files", root, ("c.jpg",)),
    ]


def test_limit(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(range(10)))
    write_tar(tmp_path / "b.tar", ["1.png", "1.json", "2.png", "3.png"])
    storage.write_bytes(str(tmp_path / "c.png"), b"x")
    for limit in (1, 4, 9, 10, 11, 12, 13, 14, 99):
        plan = list(plan_shards(str(tmp_path), 6, limit))
        assert sum(spec.num_samples for spec in plan) == min(limit, 14)
    plan = list(plan_shards(str(tmp_path), 6, 12))
    assert [(s.kind, s.row_start, s.row_stop) for s in plan] == [
        ("parquet", 0, 4),
        ("parquet", 4, 10),
        ("tar", 0, 2),
    ]
    loose = list(plan_shards("s3://b/in", 4, 6, listing=keys(100)))
    assert [spec.num_samples for spec in loose] == [4, 2]


def test_corrupt_files_are_planned_so_that_they_can_be_quarantined(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    (tmp_path / "cut.tar").write_bytes(b"\1" * 700)
    plan = list(plan_shards(str(tmp_path), 5, limit=100))
    assert [(s.members[0], s.num_samples, s.row_stop) for s in plan] == [
        ("a.parquet", 2, 2),
        ("bad.parquet", -1, 0),
        ("cut.tar", -1, 0),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "img"}, r"no column 'img'; it has id, image\. Set input.image_column"),
        ({"image_column": "id"}, r"column 'id' is int64; expected binary"),
        ({"key_column": "name"}, r"no column 'name'; it has id, image\. Set input.key_column"),
        ({"key_column": "image"}, r"column 'image' is binary; sample keys must be text"),
        ({"fit": "align"}, r"no column 'landmarks5'; it has id, image"),
    ],
)
def test_columns_are_checked_while_planning(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(ConfigError, match=message):
        list(plan_shards(str(tmp_path), 5, input=InputConfig(**settings)))


def test_alignment_of_loose_pictures_needs_a_detector(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a.png"), b"x")
    with pytest.raises(ConfigError, match=r"loose pictures, which have no landmarks"):
        list(plan_shards(str(tmp_path), 5, input=InputConfig(fit="align")))
    config = InputConfig(fit="align", detector="package.module:function")
    assert len(list(plan_shards(str(tmp_path), 5, input=config))) == 1


def test_repeated_keys_of_a_column_are_found_over_all_files(tmp_path: Path) -> None:
    config = InputConfig(key_column="id")
    write_parquet(tmp_path / "a.parquet", ["x", "y", "z"])
    write_parquet(tmp_path / "b.parquet", ["u", "v", "y"])
    with pytest.raises(
        ConfigError, match=r"key 'y' twice: .*a.parquet row 1 and .*b.parquet row 2"
    ):
        list(plan_shards(str(tmp_path), 5, input=config))
    assert len(list(plan_shards(str(tmp_path), 5, limit=5, input=config))) == 2
    assert len(list(plan_shards(str(tmp_path), 5))) == 2
    write_parquet(tmp_path / "b.parquet", ["u", None, "w"])
    with pytest.raises(ConfigError, match=r"b.parquet, row 1: column 'id' is null"):
        list(plan_shards(str(tmp_path), 5, input=config))
    write_parquet(tmp_path / "b.parquet", ["u", "v", "w"])
    storage.write_bytes(str(tmp_path / "c.png"), b"x")
    with pytest.raises(ConfigError, match="keys could collide"):
        list(plan_shards(str(tmp_path), 5, input=config))


def test_hash_collisions_are_no_repeated_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.input.footers._hash", lambda key: 7)
    write_parquet(tmp_path / "a.parquet", ["x", "y"])
    config = InputConfig(key_column="id")
    assert len(list(plan_shards(str(tmp_path), 5, input=config))) == 1
    write_parquet(tmp_path / "a.parquet", ["x", "x"])
    with pytest.raises(ConfigError, match="key 'x' twice"):
        list(plan_shards(str(tmp_path), 5, input=config))


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing: there is no such file or folder"):
        list(plan_shards(str(tmp_path / "missing"), 5))
    with pytest.raises(ConfigError, match=r"no pictures in .*\.jpg, .*\.tar\.gz.*found nothing"):
        list(plan_shards(str(tmp_path), 5))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.gz").write_text("x")
    with pytest.raises(ConfigError, match=r"no pictures in .*found only 1 \.txt, 1 \.gz"):
        list(plan_shards(str(tmp_path), 5))
    with pytest.raises(ConfigError, match=r"a\.txt is not a kind of file"):
        plan_shards(str(tmp_path / "a.txt"), 5)
    with pytest.raises(ConfigError, match="shard_size is 0"):
        plan_shards(str(tmp_path), 0)
    with pytest.raises(ConfigError, match="limit is 0"):
        plan_shards(str(tmp_path), 5, 0)


def test_name_that_is_no_text(tmp_path: Path) -> None:
    listing = [("caf\udce9.png", 1, "x")]
    with pytest.raises(ConfigError, match=r"caf\\\\udce9.png' is not UTF-8.*Rename"):
        list(plan_shards(str(tmp_path), 5, listing=listing))


def test_manifest_comes_back_as_it_was_planned(tmp_path: Path) -> None:
    plan = list(plan_shards("s3://b/in", 300, listing=keys(70_000)))
    assert len(plan) == 234
    run = str(tmp_path / "run")
    info = write_manifest(run, iter(plan))
    assert (info.num_shards, info.num_samples) == (234, 70_000)
    assert info.num_bytes == sum(size for _, size, _ in keys(70_000))
    assert list(read_manifest(run)) == plan
    assert pq.ParquetFile(f"{run}/manifest.parquet").metadata.num_row_groups == 3
    for shard in (0, 109, 110, 233):
        assert read_shard_spec(run, shard) == plan[shard]
    for shard in (-1, 234):
        with pytest.raises(LedgerError, match=f"has shards 0 to 233, no {shard}"):
            read_shard_spec(run, shard)
    assert describe_manifest(run) == info


def test_hash_tells_the_plan_and_not_the_time(tmp_path: Path) -> None:
    plan = list(plan_shards("s3://b/in", 3, listing=keys(10)))
    first = write_manifest(str(tmp_path / "1"), plan)
    time.sleep(0.01)
    assert write_manifest(str(tmp_path / "2"), plan) == first
    assert describe_manifest(str(tmp_path / "2")).sha256 == first.sha256
    other = [*plan[:-1], replace(plan[-1], etag="changed")]
    assert write_manifest(str(tmp_path / "3"), other).sha256 != first.sha256


def test_manifest_of_a_begun_run_is_never_replaced(tmp_path: Path) -> None:
    run = str(tmp_path)
    first = write_manifest(run, plan_shards("s3://b/in", 3, listing=keys(10)))
    second = write_manifest(run, plan_shards("s3://b/in", 5, listing=keys(10)))
    assert second != first  # not begun yet: replaced
    storage.write_bytes(f"{run}/run.json", b"{}")
    data = (tmp_path / "manifest.parquet").read_bytes()
    assert write_manifest(run, plan_shards("s3://b/in", 5, listing=keys(10))) == second
    with pytest.raises(LedgerError, match=r"begun with another input.*2 shards with 10 samples"):
        write_manifest(run, plan_shards("s3://b/in", 5, listing=keys(11)))
    assert (tmp_path / "manifest.parquet").read_bytes() == data


def test_failed_planning_writes_nothing(tmp_path: Path) -> None:
    def fails() -> Iterator[ShardSpec]:
        yield from plan_shards("s3://b/in", 3, listing=keys(10))
        raise ConfigError("found at the end")

    with pytest.raises(ConfigError, match="found at the end"):
        write_manifest(str(tmp_path), fails())
    assert list(tmp_path.iterdir()) == []


def test_missing_and_corrupt_manifest(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"manifest cannot be opened.*no such file"):
        list(read_manifest(str(tmp_path)))
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(LedgerError, match=r"manifest cannot be opened.*corrupt"):
        list(read_manifest(str(tmp_path)))


def test_only_one_shard_is_in_memory_while_planning(tmp_path: Path) -> None:
    """However long the listing: the plan never runs more than a shard and a window ahead."""
    given = 0

    def count() -> Iterator[tuple[str, int, str]]:
        nonlocal given
        for entry in keys(1_000_000):
            given += 1
            yield entry

    plan = plan_shards("s3://b/in", 100, listing=count())
    for taken in range(1, 20):
        next(plan)
        assert given <= 100 * taken + 32


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_million_keys(tmp_path: Path) -> None:
    """Plan, and read again: under 60 s, and under 1 GiB more than before."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    info = write_manifest(str(tmp_path), plan_shards("s3://b/in", 1000, listing=keys(1_000_000)))
    assert (info.num_shards, info.num_samples) == (1000, 1_000_000)
    assert sum(len(spec.members) for spec in read_manifest(str(tmp_path))) == 1_000_000
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB

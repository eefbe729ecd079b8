"""The same pictures as loose files, as a WebDataset tar and as Parquet, for tests of readers."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LANDMARKS = [0.3, 0.3, 0.7, 0.3, 0.5, 0.5, 0.35, 0.7, 0.65, 0.7]


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_inputs(folder: Path, pictures: Sequence[bytes]) -> None:
    """loose/000.png ..., data.tar, data.tar.gz, data.parquet (row groups of 3) below `folder`."""
    (folder / "loose").mkdir(parents=True)
    for index, data in enumerate(pictures):
        (folder / "loose" / f"{index:03d}.png").write_bytes(data)
    for name, mode in (("data.tar", "w"), ("data.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as archive:
            for index, data in enumerate(pictures):
                add_member(archive, f"{index:03d}.png", data)
                points = json.dumps({"landmarks5": LANDMARKS, "age": 30}).encode()
                add_member(archive, f"{index:03d}.json", points)
    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]
    table = pa.table(
        {
            "image": images,
            "raw": list(pictures),
            "landmarks5": [LANDMARKS] * len(pictures),
            "name": [f"n{i}" for i in range(len(pictures))],
        }
    )
    pq.write_table(table, folder / "data.parquet", row_group_size=3)

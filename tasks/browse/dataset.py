"""Some samples of a run to take away: one Parquet file, or a folder of pictures as a zip.

Both open in Hugging Face `datasets` with the pictures as pictures: the Parquet file by its
metadata, the folder as an `imagefolder` with `metadata.jsonl`. Names in the folder are numbers: a
sample's key is a value, never a path.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.browse.pictures import media_type
from tasks.run.export import features, with_pictures
from tasks.run.marker import Marker, Part
from tasks.storage.files import join
from tasks.storage.part_files import open_part, part_errors

SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


def write_parquet(
    path: Path, run_uri: str, markers: Mapping[int, Marker], shards: Mapping[str, int]
) -> int:
    """Rows of `latents/` and their pictures, in order of shards and keys.

    Args:
        shards: the samples, with the shard of each.

    Returns:
        The number of rows.
    """
    writer: pq.ParquetWriter | None = None
    rows = 0
    for table in _tables(run_uri, markers, shards):
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False)
        writer.write_table(table.cast(writer.schema))
        rows += len(table)
    if writer is not None:
        writer.close()
    return rows


def write_folder(
    path: Path, run_uri: str, markers: Mapping[int, Marker], shards: Mapping[str, int]
) -> int:
    """A zip: `metadata.jsonl`, a line for each sample, and its pictures `<number>-<column>`.

    Returns:
        The number of samples.
    """
    lines: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for table in _tables(run_uri, markers, shards):
            for row in table.to_pylist():
                lines.append(_line(archive, len(lines), row))
        archive.writestr("metadata.jsonl", "\n".join(lines) + "\n")
    return len(lines)


def _line(archive: zipfile.ZipFile, number: int, row: dict[str, Any]) -> str:
    said: dict[str, Any] = {}
    for at, (name, value) in enumerate(row.items()):
        if not isinstance(value, dict):
            said[name] = value
            continue
        kind = media_type(value["bytes"] or b"")
        if kind is not None:
            file = f"{number:06d}-{at:02d}.{SUFFIXES[kind]}"
            archive.writestr(file, value["bytes"])
            said[f"{name}_file_name"] = file
    return json.dumps(said, ensure_ascii=False, allow_nan=True)


def _tables(
    run_uri: str, markers: Mapping[int, Marker], shards: Mapping[str, int]
) -> Iterator[pa.Table]:
    by_shard: dict[int, list[str]] = {}
    for key, shard in shards.items():
        by_shard.setdefault(shard, []).append(key)
    for shard in sorted(by_shard):
        parts = markers[shard].parts
        rows = _rows(run_uri, parts["latents"], by_shard[shard])
        if "images" in parts:
            rows = with_pictures(rows, _rows(run_uri, parts["images"], by_shard[shard]))
        yield rows.replace_schema_metadata(features(rows.schema))


def _rows(run_uri: str, part: Part, keys: Sequence[str]) -> pa.Table:
    uri = join(run_uri, part.path)
    wanted = set(keys)
    file = open_part(uri, part.bytes)
    with part_errors(uri):
        groups = [
            table.filter(pa.array([key in wanted for key in table["sample_key"].to_pylist()]))
            for table in map(file.read_row_group, range(file.num_row_groups))
        ]
    return pa.concat_tables(groups)

"""Column chunks of a footer: what pyarrow says of good files; a damaged file is a corrupt file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ShardError
from tasks.input.footers import read_footer
from tasks.input.parquet import read_parquet
from tasks.input.row_groups import row_groups
from tasks.job import InputConfig, ShardSpec


def table(rows: int = 50) -> pa.Table:
    return pa.table(
        {
            "image": [bytes([n]) * n for n in range(rows)],
            "id": pa.array([f"k{n}" if n % 3 else None for n in range(rows)]),
            "points": pa.array([[float(n)] * 3 for n in range(rows)], pa.list_(pa.float32())),
            "a.b": np.arange(rows) % 2 == 0,
            "s": [{"x": n, "y": 0.5} for n in range(rows)],
            **{f"more{n}": np.zeros(rows) for n in range(20)},
        }
    )


@pytest.mark.parametrize("options", [{}, {"write_page_index": True, "compression": "zstd"}])
def test_as_pyarrow_says(options: dict[str, object], tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=3, **options)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    found = row_groups(metadata)
    assert len(found) == metadata.num_row_groups == 17
    for number, group in enumerate(found):
        twin = metadata.row_group(number)
        assert group.num_rows == twin.num_rows
        columns = [twin.column(index) for index in range(twin.num_columns)]
        assert [(c.num_values, c.unpacked, c.packed) for c in group.chunks] == [
            (c.num_values, c.total_uncompressed_size, c.total_compressed_size) for c in columns
        ]
        names = [chunk.column for chunk in group.chunks]
        assert names[:6] == ["image", "id", "points", "a.b", "s", "s"]
    assert sum(len(group.of("s", "image")) for group in found) == 17 * 3


def test_a_footer_that_ends_the_process_in_pyarrow_is_a_corrupt_file(tmp_path: Path) -> None:
    """A histogram of definition levels with one level more than the column has."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 3}), path, store_schema=False)
    optional, required = b"%\x02\x18\x05image", b"%\x00\x18\x05image"
    assert path.read_bytes().count(optional) == 1
    path.write_bytes(path.read_bytes().replace(optional, required))

    accessor = (
        "import sys, pyarrow.parquet as pq; pq.read_metadata(sys.argv[1]).row_group(0).column(0)"
    )
    ended = subprocess.run([sys.executable, "-c", accessor, path], capture_output=True, check=False)
    assert ended.returncode < 0, "pyarrow raises now: use its accessor again"

    read_footer(str(path), InputConfig())
    with pytest.raises(ShardError, match=r"a\.parquet is corrupt"):
        list(read_parquet(ShardSpec(id=0, kind="parquet", uri=str(path)), InputConfig()))

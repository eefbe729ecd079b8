"""Parquet parts of one shard: the exact layout of what is stored of every sample.

    latents/     one row per sample, failed ones included (status, reason), sorted by sample_key
    images/      one row per inverted sample: encoded pictures as {bytes, path}
    residuals/   one row per inverted sample, when the method opens another door of the generator
                 than w_plus: optimised noise maps, replaced features, low-rank kernel residuals.
                 With w_plus they render the inversion again. Half precision (relative error 5e-4):
                 a noise map has as many values as its layer has pixels.
    vectors/     of an index: one row per inverted sample with its key, scores, sketch and 8-bit
                 code, as an Arrow file, which readers map into memory
    exact/       of an index: the float16 vectors behind the codes, [N E] in NumPy's format: row n
                 is read without its neighbours

The bytes of a part depend on the rows alone: no time, attempt, host or number of workers is inside.
A part without rows is not written: `datasets` cannot open a Parquet file of zero rows.

Codes are a fixed-size list with the shape in the field's metadata (`{"shape": "[18, 512]"}`), not
Arrow's FixedShapeTensor: `datasets` refuses that extension type; DuckDB, Polars and pandas show
both as the same list.

Legend: N samples, L num_ws, D w_dim, H W picture.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import ShardError
from tasks.job import OutputConfig
from tasks.run.ledger import shard_name
from tasks.run.marker import Part
from tasks.run.rows import Row, picture_suffix
from tasks.run.run_json import RunHandle
from tasks.storage.crash import crash_point
from tasks.storage.files import join, write_bytes

ENDINGS = {"vectors": "arrow", "exact": "npy"}
"""Of the names of parts that are not Parquet."""
SHAPE_KEY = "w_plus_shape"
"""In the footer of latents/: "[L, D]", for readers that do not look into Arrow's schema."""
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides the columns of a run's parts.

    Attributes:
        method: the chain, e.g. "e4e+wplus".
        metrics: names of the metric columns, in order.
        shape: (L, D) of w_plus.
        variants: names of the edited pictures, stored beside those of `output`.
        faces: samples were aligned: box, points, transform and score of each face.
        checked: they were not, and it was looked whether they are.
        texts: names of columns of texts.
    """

    method: str
    metrics: tuple[str, ...]
    shape: tuple[int, int]
    output: OutputConfig
    variants: tuple[str, ...] = ()
    faces: bool = False
    checked: bool = False
    texts: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        """The columns of images/."""
        return (*self.output.pictures, *self.variants)


# ---------------------------------------------------------------------------- tables


def latents_table(rows: Sequence[Row], layout: Layout, run_id: str) -> pa.Table:
    """sample_key, image_uri, image_sha256, status, error_kind, error, method, w_plus, metrics,
    seed, run_id. Codes and metrics of failed rows are null."""
    text, looks = pa.string(), [r.looks_aligned for r in rows]
    codes = _in_place(_tensor_field("w_plus", np.dtype(layout.output.latents), layout.shape))
    columns: list[tuple[pa.Field, Any]] = [
        (pa.field("sample_key", text, nullable=False), [r.sample_key for r in rows]),
        (pa.field("image_uri", text), [r.image_uri for r in rows]),
        (pa.field("image_sha256", text), [r.image_sha256 for r in rows]),
        (
            pa.field("status", text, nullable=False),
            ["ok" if r.error_kind is None else "failed" for r in rows],
        ),
        (pa.field("error_kind", text), [r.error_kind for r in rows]),
        (pa.field("error", text), [r.error for r in rows]),
        (pa.field("method", text, nullable=False), [layout.method] * len(rows)),
        (codes, _tensor_array([r.w_plus for r in rows], codes.type)),
        *_metric_columns(rows, layout),
        *(_face_columns(rows) if layout.faces else ()),
        *([(pa.field("looks_aligned", pa.bool_()), looks)] if layout.checked else ()),
        *((pa.field(name, text), [r.texts.get(name) for r in rows]) for name in layout.texts),
        (pa.field("seed", pa.int64(), nullable=False), [r.seed for r in rows]),
        (pa.field("run_id", text, nullable=False), [run_id] * len(rows)),
    ]
    return _table(columns, {SHAPE_KEY: json.dumps(list(layout.shape))})


def _metric_columns(rows: Sequence[Row], layout: Layout) -> Iterator[tuple[pa.Field, Any]]:
    metrics = [row.metrics for row in rows]
    for name in layout.metrics:
        yield pa.field(name, pa.float32()), list(map(dict.get, metrics, repeat(name)))


def _face_columns(rows: Sequence[Row]) -> list[tuple[pa.Field, Any]]:
    """face_box [4], face_points [5 2], face_transform [4] (real and imaginary parts of a, b) and
    face_score; null where there is no face, or nobody told."""
    kinds = {
        "box": (np.float32, (4,)),
        "points": (np.float32, (5, 2)),
        "transform": (float, (2, 2)),
    }
    columns: list[tuple[pa.Field, Any]] = []
    for name, (dtype, shape) in kinds.items():
        field_ = _tensor_field(f"face_{name}", np.dtype(dtype), shape)
        columns.append((field_, _tensor_array([_face_values(r, name) for r in rows], field_.type)))
    scores = [r.face.score if r.face else None for r in rows]
    return [*columns, (pa.field("face_score", pa.float32()), scores)]


def _face_values(row: Row, name: str) -> np.ndarray | None:
    value = None if row.face is None else getattr(row.face, name)
    if name == "transform" and value is not None:
        return np.array([(each.real, each.imag) for each in value])
    return None if value is None else np.asarray(value)


def images_table(rows: Sequence[Row], layout: Layout) -> pa.Table:
    """sample_key and one {bytes, path} struct per picture, with the Hugging Face feature metadata
    that makes `datasets` show pictures."""
    names = layout.pictures
    suffixes = {name: picture_suffix(name, layout.output.picture_format) for name in names}
    columns: list[tuple[pa.Field, Any]] = [
        (pa.field("sample_key", pa.string(), nullable=False), [r.sample_key for r in rows])
    ]
    for name in names:
        values = [
            {"bytes": r.pictures[name], "path": f"{r.sample_key}.{name}.{suffixes[name]}"}
            for r in rows
        ]
        columns.append((pa.field(name, PICTURE), values))
    features = {"sample_key": {"dtype": "string", "_type": "Value"}}
    features |= {name: {"_type": "Image"} for name in names}
    return _table(columns, {"huggingface": json.dumps({"info": {"features": features}})})


def residuals_table(rows: Sequence[Row]) -> pa.Table:
    """sample_key and a float16 fixed-size list per map or factor, shape in the field's metadata."""
    columns: list[tuple[pa.Field, Any]] = [
        (pa.field("sample_key", pa.string(), nullable=False), [r.sample_key for r in rows])
    ]
    for name, first in rows[0].doors.items():
        field_ = _tensor_field(name, first.dtype, first.shape)
        columns.append((field_, _tensor_array([r.doors[name] for r in rows], field_.type)))
    return _table(columns)


def vectors_table(rows: Sequence[Row], layout: Layout) -> pa.Table:
    """sample_key, metrics, and `sketch` and `code`, fixed-size lists of uint8."""
    columns: list[tuple[pa.Field, Any]] = [
        (pa.field("sample_key", pa.string(), nullable=False), [r.sample_key for r in rows]),
        *_metric_columns(rows, layout),
    ]
    for name in ("sketch", "code"):
        kind = pa.list_(pa.field("element", pa.uint8()), len(rows[0].vectors[name]))
        columns.append((pa.field(name, kind), _tensor_array([r.vectors[name] for r in rows], kind)))
    return _table(columns)


def _table(columns: list[tuple[pa.Field, Any]], metadata: dict[str, str] | None = None) -> pa.Table:
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, type=field_.type)
        for field_, values in columns
    ]
    return pa.Table.from_arrays(
        arrays, schema=pa.schema([field_ for field_, _ in columns], metadata)
    )


def _tensor_field(name: str, dtype: np.dtype, shape: Sequence[int]) -> pa.Field:
    kind = pa.list_(pa.from_numpy_dtype(dtype), int(np.prod(shape)))
    return pa.field(name, kind, metadata={"shape": json.dumps([int(n) for n in shape])})


def _in_place(codes: pa.Field) -> pa.Field:
    """The same field with the promise of `to_parquet` about its bytes."""
    return codes.with_metadata({**codes.metadata, b"layout": b"rows"})


def has_rows_in_place(field_: pa.Field) -> bool:
    """Whether the values of a column are the last bytes of its chunks, row by row."""
    return (field_.metadata or {}).get(b"layout") == b"rows"


def _tensor_array(values: Sequence[np.ndarray | None], kind: pa.FixedSizeListType) -> pa.Array:
    given, dtype = [v for v in values if v is not None], kind.value_type.to_pandas_dtype()
    missing = np.array([value is None for value in values], bool)
    flat = np.zeros((len(values), kind.list_size), dtype)
    if given:
        joined = np.concatenate(given, None, dtype=dtype, casting="same_kind")
        flat[~missing] = joined.reshape(len(given), -1)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(flat.reshape(-1)), type=kind, mask=pa.array(missing)
    )


# ---------------------------------------------------------------------------- files


def write_parts(
    rows: Sequence[Row],
    layout: Layout,
    run: RunHandle,
    shard: int,
    attempt: str,
    generation: int = 0,
) -> dict[str, Part]:
    """Store the rows of one shard, sorted by key, under names that only this attempt uses.

    Args:
        generation: of the shard (`tasks.run.ledger`).

    Raises:
        ShardError: two samples have one key, or the store refuses (full disk, credentials).
    """
    rows = sorted(rows, key=lambda row: row.sample_key)
    _refuse_duplicates(rows, shard)
    inverted = [row for row in rows if row.error_kind is None]
    files: dict[str, Callable[[], bytes]] = {}
    if rows:
        files["latents"] = lambda: to_parquet(latents_table(rows, layout, run.run_id), "latents")
    if inverted and layout.pictures:
        files["images"] = lambda: to_parquet(images_table(inverted, layout), "images")
    if inverted and inverted[0].doors:
        files["residuals"] = lambda: to_parquet(residuals_table(inverted), "residuals")
    if inverted and inverted[0].vectors:
        files["vectors"] = lambda: to_arrow(vectors_table(inverted, layout))
        files["exact"] = lambda: to_npy([row.vectors["exact"] for row in inverted])
    parts: dict[str, Part] = {}
    with ThreadPoolExecutor(1) as beside:
        for kind, build in files.items():
            data = build()
            digest = beside.submit(hashlib.sha256, data)
            ending = ENDINGS.get(kind, "parquet")
            path = f"{kind}/{shard_name(shard, generation)}-{attempt}.{ending}"
            write_bytes(join(run.uri, path), data)
            count, sha256 = len(rows if kind == "latents" else inverted), digest.result()
            parts[kind] = Part(path=path, rows=count, bytes=len(data), sha256=sha256.hexdigest())
            if len(parts) == 1:
                crash_point("between_parts", shard)
    return parts


def to_parquet(table: pa.Table, kind: str) -> bytes:
    """The file of a part.

    Codes are neither compressed nor split, one page to a row group: they are the last bytes of
    their column chunk, row after row without the failed ones, so that one code is one read of just
    its bytes (`layout` is `rows` in the field's metadata). That costs 8 % of float16 codes and 19 %
    of float32 ones, and a copy of them all elsewhere is not needed.

    Other float32 vectors: zstd 3 with byte-stream-split; float16 vectors without it, which DuckDB
    2.0 cannot read together. Dictionaries make those larger than raw; 8-bit codes, which Parquet
    holds as 32-bit integers, are smaller with one (0.91 bytes each, against 1.27). Pictures are
    compressed already. Row groups are small enough that one of them is a comfortable read.
    """
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    in_place = [f.name for f in table.schema if has_rows_in_place(f)]
    kinds = {name: table.schema.field(name).type.value_type for name in vectors}
    split = [name for name in vectors if kinds[name] == pa.float32() and name not in in_place]
    codes = [f"{name}.list.element" for name in vectors if kinds[name] == pa.int8()]
    small = [n for n in table.column_names if kind != "images" and n not in in_place]
    with_statistics = [
        name for name in table.column_names if name not in vectors and kind != "images"
    ] or ["sample_key"]
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=_row_group_rows(table, kind),
        compression={  # type: ignore[arg-type]  # a name for each column is allowed too
            _leaf(field): "zstd" if field.name in small else "none" for field in table.schema
        },
        compression_level={_leaf(field): 3 for field in table.schema if field.name in small},
        data_page_size=2**30 if in_place else None,
        use_dictionary=codes or False,  # type: ignore[arg-type]  # columns are allowed here too
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split} or None,
        write_statistics=with_statistics,  # type: ignore[arg-type]  # columns are allowed too
        write_page_index=True,
        store_schema=True,
        sorting_columns=[pq.SortingColumn(table.schema.get_field_index("sample_key"))],
    )
    return buffer.getvalue()


def to_arrow(table: pa.Table) -> bytes:
    """An uncompressed Arrow file of one record batch: every column is one piece of the file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def to_npy(vectors: Sequence[np.ndarray]) -> bytes:
    """[N E] in NumPy's format, without the two copies that `np.save` of one array would take."""
    header, (first, *_) = io.BytesIO(), vectors
    about = np.lib.format.header_data_from_array_1_0(first)
    np.lib.format.write_array_header_1_0(header, about | {"shape": (len(vectors), len(first))})
    return b"".join([header.getvalue(), *(vector.data for vector in vectors)])


def _leaf(field_: pa.Field) -> str:
    """A column as Parquet calls it."""
    is_list = pa.types.is_fixed_size_list(field_.type)
    return f"{field_.name}.list.element" if is_list else field_.name


def _row_group_rows(table: pa.Table, kind: str) -> int:
    """1,024 rows for W (512 floats), 128 for W+ (18 x 512); of pictures 8 MiB or 128 rows."""
    if kind == "images":
        return min(128, max(1, 2**23 * table.num_rows // table.nbytes))
    floats = sum(f.type.list_size for f in table.schema if pa.types.is_fixed_size_list(f.type))
    rows = 1024
    while rows > 8 and rows * floats > 2**21:
        rows //= 2
    return rows


def _refuse_duplicates(rows: Sequence[Row], shard: int) -> None:
    for before, after in pairwise(rows):
        if before.sample_key == after.sample_key:
            raise ShardError(
                f"shard {shard_name(shard)}: two samples have the key {after.sample_key!r} "
                f"({before.image_uri} and {after.image_uri}); keys must be unique: choose another "
                "input.key_column, or rename the files inside the tar"
            )

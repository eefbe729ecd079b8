"""Read a run's inversions back: to render and to edit them without the original pictures.

    for batch in read_inversions("runs/faces", generator):
        pictures = batch.inversion.render(generator)

Only what a commit marker names is read. All doors come back as they were stored: codes, noise maps,
features, kernel residuals, tuned weights; rendered by the generator and precision of the run, they
give the stored pictures again.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import AssetError, ConfigError, LedgerError
from models.inversion.base import Inversion
from models.stylegan2.generator import Generator, weights_hash
from tasks.run.ledger import read_markers, shard_name
from tasks.run.marker import Marker, Part
from tasks.run.parts import has_rows_in_place
from tasks.run.run_json import read_run
from tasks.storage.files import join
from tasks.storage.part_files import PartFile, chunk_of, part_errors, read_range

_CODES = ["sample_key", "status", "w_plus"]


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """Some inverted samples of one shard, in the order of their keys.

    Attributes:
        sample_keys: one for each row of `inversion`.
        inversion: float32 (changes of weights stay 8-bit), on the CPU.
        pictures: encoded, by column, where they were asked for.
    """

    sample_keys: tuple[str, ...]
    inversion: Inversion
    pictures: dict[str, tuple[bytes, ...]]

    @property
    def inputs(self) -> tuple[bytes, ...] | None:
        """The encoded input pictures, where they were asked for."""
        return self.pictures.get("input")


def read_inversions(
    run_uri: str, generator: Generator, *, batch: int = 64, with_inputs: bool = False
) -> Iterator[StoredBatch]:
    """Every inverted sample of the committed shards; failed ones are left out.

    The run may still be at work: what is committed when this is called is what comes.

    Args:
        generator: the run's own; codes and residuals mean nothing to another.
        batch: rows at a time, at most; a batch never spans two shards.
        with_inputs: the input pictures too; the run must have stored them (`output.pictures`).

    Raises:
        AssetError: the run was made with another generator.
        LedgerError: there is no run, inputs are asked for that it has not stored, or (while
            reading) a committed part is missing or damaged.
    """
    check_run_generator(run_uri, generator)
    stored = read_run(run_uri)["config"]["output"]["pictures"]
    if with_inputs and "input" not in stored:
        raise LedgerError(
            f"{run_uri} has no input pictures, only {stored or 'codes'}: read it without them, or "
            'run again with "input" among output.pictures'
        )
    markers = read_markers(run_uri)
    return (
        found
        for marker in markers.values()
        if "latents" in marker.parts
        for found in read_shard_inversions(
            run_uri, marker, batch, ("input",) if with_inputs else ()
        )
    )


def check_run_generator(run_uri: str, generator: Generator) -> None:
    """Refuse a generator that a run was not made with.

    Raises:
        AssetError: the hashes differ.
        LedgerError: there is no run.
    """
    record = read_run(run_uri)
    made_with, given = record["weights"].get("generator"), weights_hash(generator)
    if made_with != given:
        raise AssetError(
            f"{run_uri} was made with generator {made_with}, the one given is {given}: residuals "
            "and codes of one generator mean nothing to another; load the generator that "
            f"run.json names ({record['config'].get('generator')})"
        )


def read_codes(run_uri: str, sample_keys: Collection[str]) -> dict[str, Float[Tensor, "L D"]]:
    """The codes of a few samples by key.

    Raises:
        LedgerError: there is no run, or a part is damaged.
        ConfigError: a sample is not in the run, or was not inverted.
    """
    found: dict[str, Tensor] = {}
    for marker in read_markers(run_uri).values() if sample_keys else ():
        for table in _slices(run_uri, marker.parts["latents"], _CODES, 1024):
            codes = _tensors(table)["w_plus"]
            keys = table["sample_key"].to_pylist()
            found |= {key: codes[at] for at, key in enumerate(keys) if key in sample_keys}
        if len(found) == len(sample_keys):
            break
    missing = sorted(set(sample_keys) - found.keys())
    if missing:
        raise ConfigError(
            f'{run_uri} has no inverted sample {missing[0]!r}; `refinery query {run_uri} "SELECT '
            "sample_key FROM latents WHERE status = 'ok'\"` lists them"
        )
    return found


def read_shard_inversions(
    run_uri: str,
    marker: Marker,
    batch: int,
    columns: Sequence[str] = (),
    *,
    with_doors: bool = True,
) -> Iterator[StoredBatch]:
    """The inverted samples of one committed shard; see `read_inversions`.

    Args:
        columns: pictures to read too.
        with_doors: read what is stored beside the codes; without, the batches hold codes alone.
    """
    parts = marker.parts
    others: list[Iterator[pa.Table]] = []
    if with_doors and "residuals" in parts:
        others.append(_slices(run_uri, parts["residuals"], None, batch))
    if columns and "images" in parts:
        others.append(_slices(run_uri, parts["images"], ["sample_key", *columns], batch))
    for codes in _slices(run_uri, parts["latents"], _CODES, batch):
        keys = codes["sample_key"].to_pylist()
        tables = [next(other, None) for other in others]
        if any(table is None or table["sample_key"].to_pylist() != keys for table in tables):
            raise LedgerError(
                f"{run_uri}: the parts of shard {shard_name(marker.shard)} hold different samples; "
                "run `refinery verify`, which lists all damage"
            )
        tensors, pictures = _tensors(codes), {}
        for table in tables:
            assert table is not None
            tensors |= _tensors(table)
            for name in set(columns) & set(table.column_names):
                pictures[name] = tuple(picture["bytes"] for picture in table[name].to_pylist())
        yield StoredBatch(
            sample_keys=tuple(keys), inversion=Inversion.from_tensors(tensors), pictures=pictures
        )


def _slices(run_uri: str, part: Part, columns: list[str] | None, size: int) -> Iterator[pa.Table]:
    """The part's inverted rows, `size` at a time; a row group or two are in memory."""
    uri = join(run_uri, part.path)
    with part_errors(uri):
        file = pq.ParquetFile(PartFile(uri, part.bytes))
    in_place, row = _in_place(file, columns), 0
    with part_errors(uri):  # keys and states are small; reading them by groups takes longer
        small = None if in_place is None else file.read([c for c in columns or () if c != in_place])
    waiting: list[pa.Table] = []
    for group in range(file.num_row_groups):
        if small is not None:
            table = small.slice(row, file.metadata.row_group(group).num_rows)
            row += table.num_rows
        else:
            with part_errors(uri):
                table = file.read_row_group(group, columns)
        if "status" in table.column_names:
            is_ok = [status == "ok" for status in table["status"].to_pylist()]
            table = table if all(is_ok) else table.filter(pa.array(is_ok))
        if in_place is not None:
            codes = _codes(file, uri, group, table.num_rows)
            table = table.append_column(file.schema_arrow.field(in_place), codes)
        rest = pa.concat_tables([*waiting, table])
        while rest.num_rows >= size:
            yield rest.slice(0, size)
            rest = rest.slice(size)
        waiting = [rest]
    if waiting and waiting[0].num_rows:
        yield waiting[0]


def _in_place(file: pq.ParquetFile, columns: list[str] | None) -> str | None:
    """The wanted column whose rows are the last bytes of their chunks, if there is one."""
    wanted = [file.schema_arrow.field(name) for name in columns or [] if name == "w_plus"]
    return next((f.name for f in wanted if has_rows_in_place(f)), None)


def _codes(file: pq.ParquetFile, uri: str, group: int, count: int) -> pa.Array:
    """The codes of a row group's inverted rows as they lie there: the Parquet decoder, which goes
    through them value by value, takes twenty times as long."""
    kind, chunk = file.schema_arrow.field("w_plus").type, chunk_of(file, group, "w_plus")
    end = chunk.data_page_offset + chunk.total_compressed_size
    size = count * kind.list_size
    data = read_range(uri, end - size * kind.value_type.bit_width // 8, end) if size else b""
    values = pa.Array.from_buffers(kind.value_type, size, [None, pa.py_buffer(data)])
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def _tensors(table: pa.Table) -> dict[str, Tensor]:
    """The table's vectors by name, in the shapes that their fields' metadata give."""
    found = {}
    for column in table.schema:
        if not pa.types.is_fixed_size_list(column.type):
            continue
        shape = json.loads((column.metadata or {})[b"shape"])
        # Neither `combine_chunks` nor `flatten`, which copy where there is nothing to join.
        chunks, size = table[column.name].chunks, column.type.list_size
        rows = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
        flat = rows.values.slice(rows.offset * size, len(rows) * size).to_numpy()
        values = torch.from_numpy(np.array(flat)).reshape(table.num_rows, *shape)
        found[column.name] = values.float() if values.is_floating_point() else values
    return found

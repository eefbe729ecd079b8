"""The samples of a run as a table of another tool: WebDataset, Hugging Face, Delta, Iceberg, Lance.

    webdataset   a tar for each shard: of each sample <shard>-<row>.json with its scalars (the
                 sample key among them), .<column>.npy of its codes, .<picture>.<ending>
    hf           a Parquet file for each shard, which `datasets.load_dataset(folder)` opens
    delta        a Delta Lake table. Half precision becomes single: Delta has none
    iceberg      the table `runs.samples` of the SQLite catalogue catalog.db in the folder; the same
    lance        the LanceDB table `samples`. Failed rows are left out: it takes no null vectors

All columns of latents/ and the pictures of images/; noise, features and residuals stay behind. A
folder is made beside its place and gets its name when it is whole; shards of tars and Parquet that
an interrupted export has finished are kept. Iceberg writes places into its files, so its folder has
its name from the start and its one commit makes the table visible.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import ConfigError, LedgerError
from tasks.export.pictures import CLAIM
from tasks.run.export import features, with_pictures
from tasks.run.ledger import read_markers, shard_name
from tasks.run.marker import Marker, Part
from tasks.run.parts import PICTURE
from tasks.run.rows import picture_suffix
from tasks.run.run_json import read_declared, read_run
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, join, local_path, open_write
from tasks.storage.part_files import read_part

PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The committed samples of a run, a shard at a time.

    Attributes:
        picture_format: of the pictures, "png".
        problems: what went wrong while a tool was reading, which may hide it in its own error.
    """

    uri: str
    markers: dict[int, Marker]
    picture_format: str
    problems: list[BaseException] = field(default_factory=list)

    def shards(self) -> Iterator[tuple[int, pa.Table]]:
        """Number and rows of each shard, in order of keys: latents and pictures; pictures of failed
        samples are null."""
        for number, marker in self.markers.items():
            yield number, self.read(marker)

    def read(self, marker: Marker) -> pa.Table:
        """The rows of one shard."""
        table = _read(self.uri, marker.parts["latents"])
        if "images" not in marker.parts:
            return table
        return with_pictures(table, _read(self.uri, marker.parts["images"]))

    def of_columns(self, convert: Callable[[pa.Table], pa.Table]) -> pa.RecordBatchReader:
        """All shards as one stream of one schema; columns that a shard lacks are null."""
        schemas = [convert(table.slice(0, 0)).schema for _, table in self.shards()]
        schema = pa.unify_schemas(schemas)

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                for _, table in self.shards():
                    yield from _as_schema(convert(table), schema).to_batches()
            except BaseException as error:
                self.problems.append(error)
                raise

        return pa.RecordBatchReader.from_batches(schema, batches())


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema; those that are not there are null."""
    there = set(table.column_names)
    columns = [
        table[each.name] if each.name in there else pa.nulls(table.num_rows, each.type)
        for each in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def export_table(run_uri: str, folder: str, form: str) -> int:
    """Write the samples of a run as a folder of another tool's.

    Args:
        folder: local; new, or what the same export began.
        form: a name of `FORMS`.

    Returns:
        The rows that are there now; failed samples count unless the form leaves them out.

    Raises:
        LedgerError: there is no run, nothing is committed, a part is damaged, or the disk refuses.
        ConfigError: the folder is not local or holds something else, or the tool is not installed.
    """
    if not is_local(folder):
        raise ConfigError(
            f"export to {folder}: --{form} writes to a local folder; copy it to the store when it "
            "is whole"
        )
    samples = _open(run_uri)
    target = Path(local_path(folder))
    claim = {"run_id": read_run(run_uri)["run_id"], "form": form}
    with storage_errors("write", folder, LedgerError):
        found = _claimed(target)
        if found is not None and {**claim, "rows": found.get("rows")} == found:
            return int(found["rows"])
        if target.exists() and (found != claim or form not in IN_PLACE):
            raise ConfigError(
                f"{folder} holds something else than an export of {run_uri} as --{form}; choose "
                "another folder, or remove that one"
            )
        place = target if form in IN_PLACE else target.with_name(f".{target.name}{PARTIAL}")
        if place.exists() and (form not in BY_SHARD or _claimed(place) != claim):
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True)
        (place / CLAIM).write_text(json.dumps(claim))
        try:
            rows = FORMS[form](samples, place)
        except Exception as error:
            if samples.problems:
                raise samples.problems[0] from error
            raise
        (place / CLAIM).write_text(json.dumps({**claim, "rows": rows}))
        if place != target:
            place.rename(target)
    return rows


def _open(run_uri: str) -> Samples:
    read_declared(run_uri)
    markers = {shard: m for shard, m in read_markers(run_uri).items() if "latents" in m.parts}
    if not markers:
        raise LedgerError(f"{run_uri}: no sample is committed in this run; nothing to export")
    stored = read_run(run_uri)["config"]["output"]["picture_format"]
    return Samples(uri=run_uri, markers=markers, picture_format=stored)


def _claimed(folder: Path) -> dict[str, Any] | None:
    """What an export has said of its folder."""
    path = folder / CLAIM
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        return None


def _read(run_uri: str, part: Part) -> pa.Table:
    return read_part(join(run_uri, part.path), part.bytes)


# ---------------------------------------------------------------------------- by shard


def _webdataset(samples: Samples, folder: Path) -> int:
    rows = 0
    for number, marker in samples.markers.items():
        rows += marker.rows
        path = folder / f"{shard_name(number)}.tar"
        if not path.exists():
            with open_write(str(path)) as file, tarfile.open(fileobj=file, mode="w") as archive:
                for name, data in _members(samples.read(marker), number, samples.picture_format):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return rows


def _members(table: pa.Table, number: int, picture_format: str) -> Iterator[tuple[str, bytes]]:
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    pictures = [f.name for f in table.schema if f.type == PICTURE]
    scalars = table.drop_columns([*vectors, *pictures]).to_pylist()
    for row, values in enumerate(scalars):
        key = f"{shard_name(number)}-{row:06d}"
        yield f"{key}.json", json.dumps(values, ensure_ascii=False, default=str).encode()
        for name in vectors:
            value = table[name][row]
            if value.is_valid:
                shape = json.loads((table.schema.field(name).metadata or {})[b"shape"])
                buffer = io.BytesIO()
                np.save(buffer, value.values.to_numpy(zero_copy_only=False).reshape(shape))
                yield f"{key}.{name}.npy", buffer.getvalue()
        for name in pictures:
            value = table[name][row]
            if value.is_valid:
                ending = picture_suffix(name, picture_format)
                yield f"{key}.{name}.{ending}", value["bytes"].as_py()


def _datasets(samples: Samples, folder: Path) -> int:
    reader = samples.of_columns(lambda table: table)
    schema = reader.schema.with_metadata(features(reader.schema))
    rows, total = 0, len(samples.markers)
    for at, marker in enumerate(samples.markers.values()):
        rows += marker.rows
        path = folder / "data" / f"train-{at:05d}-of-{total:05d}.parquet"
        if not path.exists():
            with open_write(str(path)) as file:
                pq.write_table(_as_schema(samples.read(marker), schema), file, compression="zstd")
    return rows


# ---------------------------------------------------------------------------- in one commit


def _delta(samples: Samples, folder: Path) -> int:
    with _tool("deltalake"):
        from deltalake import DeltaTable, write_deltalake
    write_deltalake(str(folder), samples.of_columns(_plain))
    return DeltaTable(str(folder)).to_pyarrow_dataset().count_rows()


def _iceberg(samples: Samples, folder: Path) -> int:
    with _tool("pyiceberg"):
        from pyiceberg.catalog.sql import SqlCatalog
    catalog = SqlCatalog("runs", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    catalog.create_namespace("runs")
    reader = samples.of_columns(_plain)
    rows = 0
    with catalog.create_table_transaction("runs.samples", schema=reader.schema) as transaction:
        for batch in reader:
            transaction.append(pa.Table.from_batches([batch]))
            rows += batch.num_rows
    catalog.close()
    return rows


def _lance(samples: Samples, folder: Path) -> int:
    with _tool("lancedb"):
        import lancedb

    def convert(table: pa.Table) -> pa.Table:
        good = table.filter(pc.field("status") == "ok")
        return _pictures_as_bytes(good)

    table = lancedb.connect(str(folder)).create_table("samples", data=samples.of_columns(convert))
    return table.count_rows()


def _plain(table: pa.Table) -> pa.Table:
    """Lists of any length, single precision, no extras in the schema."""
    table = _pictures_as_bytes(table)
    kinds = [
        pa.list_(pa.float32() if each.type.value_type == pa.float16() else each.type.value_type)
        if pa.types.is_fixed_size_list(each.type)
        else each.type
        for each in table.schema
    ]
    return table.cast(pa.schema(zip(table.column_names, kinds, strict=True)))


def _pictures_as_bytes(table: pa.Table) -> pa.Table:
    for at, each in enumerate(table.schema):
        if each.type == PICTURE:
            data, _ = table[each.name].flatten()
            table = table.set_column(at, each.name, data)
    return table.replace_schema_metadata(None)


@contextmanager
def _tool(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"this form needs the package {name} ({error}); install it: "
            "pip install -c constraints.txt 'style-refinery[export]'"
        ) from error


FORMS: dict[str, Callable[[Samples, Path], int]] = {
    "webdataset": _webdataset,
    "hf": _datasets,
    "delta": _delta,
    "iceberg": _iceberg,
    "lance": _lance,
}
BY_SHARD = ("webdataset", "hf")
"""Forms that keep finished shards when they were interrupted."""
IN_PLACE = ("iceberg",)
"""Forms whose files say where they lie."""

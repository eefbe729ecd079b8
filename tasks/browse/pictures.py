"""Stored pictures of a run by shard and key, and their thumbnails, made once.

A picture of at most `SIDE_PX` is its own thumbnail. Larger ones are reduced a row group at a time
and kept beside the run, in `thumbnails/`; where that cannot be written, in memory only.
"""

import io
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from models.errors import LedgerError, RefineryError
from tasks.input.decode import to_rgb
from tasks.run.ledger import shard_name
from tasks.run.marker import Marker
from tasks.storage.files import exists, join, read_bytes, write_bytes
from tasks.storage.part_files import PartFile, open_part, part_errors

logger = logging.getLogger(__name__)

SIDE_PX = 192
FOLDER = "thumbnails"
TYPES = {b"\x89PNG\r\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""First bytes of what is sent as a picture; nothing else is."""
_GROUPS = 256
"""Row groups whose thumbnails are kept in memory: about 1 MB each."""


def media_type(encoded: bytes) -> str | None:
    """For the browser; None for what is no picture of a kind that runs store."""
    return next((kind for start, kind in TYPES.items() if encoded.startswith(start)), None)


class Pictures:
    """The pictures that the committed parts of a run hold."""

    def __init__(self, run_uri: str, markers: Mapping[int, Marker]) -> None:
        self.run_uri, self.markers = run_uri, markers
        self.is_kept = True
        self._file = lru_cache(512)(self._open)
        self._small = lru_cache(_GROUPS)(self._thumbnails)

    def first_keys(self, shard: int, count: int) -> list[str]:
        """Keys of the first pictures of a shard."""
        file = self._file(shard)
        if file is None:
            return []
        with part_errors(self._uri(shard)):
            return file.read_row_group(0, ["sample_key"])["sample_key"].to_pylist()[:count]

    def stored(self, shard: int, key: str, column: str) -> bytes | None:
        """The encoded picture as it is stored; None where there is none."""
        found = (self._read(shard, group, column).get(key) for group in self._groups(shard, key))
        return next(filter(None, found), None)

    def thumbnail(self, shard: int, key: str, column: str) -> bytes | None:
        """A picture of at most `SIDE_PX`; None where there is none."""
        found = (self._small(shard, group, column).get(key) for group in self._groups(shard, key))
        return next(filter(None, found), None)

    def _uri(self, shard: int) -> str:
        return join(self.run_uri, self.markers[shard].parts["images"].path)

    def _open(self, shard: int) -> pq.ParquetFile | None:
        marker = self.markers.get(shard)
        if marker is None or "images" not in marker.parts:
            return None
        return open_part(self._uri(shard), marker.parts["images"].bytes)

    def _groups(self, shard: int, key: str) -> Iterator[int]:
        """The row groups whose range of keys has the key: one where a part is sorted."""
        file = self._file(shard)
        for index in range(file.num_row_groups if file else 0):
            assert file is not None
            found = file.metadata.row_group(index).column(0).statistics
            if found is None or not found.has_min_max or found.min <= key <= found.max:
                yield index

    def _read(self, shard: int, group: int, column: str) -> dict[str, bytes]:
        file = self._file(shard)
        if file is None or column not in file.schema_arrow.names:
            return {}
        # The file object is shared by threads and has one position.
        with part_errors(self._uri(shard)):
            part = self.markers[shard].parts["images"]
            again = pq.ParquetFile(PartFile(self._uri(shard), part.bytes), metadata=file.metadata)
            table = again.read_row_group(group, ["sample_key", column])
        bytes_of = table[column].combine_chunks().field("bytes")
        pairs = zip(table["sample_key"].to_pylist(), bytes_of.to_pylist(), strict=True)
        return {key: data for key, data in pairs if data is not None}

    def _thumbnails(self, shard: int, group: int, column: str) -> dict[str, bytes]:
        """The thumbnails of a row group by key."""
        uri = join(self.run_uri, FOLDER, self._name(shard, group, column))
        if self.is_kept and exists(uri):
            table = pq.read_table(pa.BufferReader(read_bytes(uri, LedgerError)))
            return dict(zip(table["key"].to_pylist(), table["picture"].to_pylist(), strict=True))
        stored = self._read(shard, group, column)
        # All pictures of a column have the generator's size.
        if all(reduced(data) is data for data in list(stored.values())[:1]):
            return stored
        found = {key: small for key, data in stored.items() if (small := reduced(data))}
        if self.is_kept:
            self._keep(uri, found)
        return found

    def _name(self, shard: int, group: int, column: str) -> str:
        marker = self.markers[shard]
        assert marker is not None
        # By number: the name of a column may hold what a file name cannot.
        file = self._file(shard)
        assert file is not None
        at = file.schema_arrow.names.index(column) if column in file.schema_arrow.names else 0
        return f"{shard_name(shard)}-{marker.attempt}-{at}-{group}.parquet"

    def _keep(self, uri: str, found: Mapping[str, bytes]) -> None:
        buffer = io.BytesIO()
        table = pa.table({"key": list(found), "picture": list(found.values())})
        pq.write_table(table, buffer, compression="none", use_dictionary=False)
        try:
            write_bytes(uri, buffer.getvalue())
        except RefineryError as error:
            self.is_kept = False
            logger.warning("thumbnails are kept in memory only: %s", error)


def reduced(encoded: bytes) -> bytes | None:
    """A thumbnail of an encoded picture: itself where it is small; None where it is no picture."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG", "WEBP")) as image:
            if max(image.size) <= SIDE_PX:
                return encoded
            image.draft("RGB", (SIDE_PX, SIDE_PX))
            small = to_rgb(image)
            small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    except (OSError, ValueError, SyntaxError, RefineryError):
        return None
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()

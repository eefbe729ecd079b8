"""A strip of a run's first pictures with their inversions and edits, for the Prefect UI."""

import io

import pyarrow.parquet as pq
from PIL import Image

from tasks.run import ledger
from tasks.storage.files import join, open_filesystem

COLUMNS = 8
MAX_ROWS = 16
SIDE_PX = 96


def preview_png(run_uri: str) -> bytes | None:
    """Inputs above, inversions and edits below, as one small PNG; None where the run keeps no
    pictures.

    Raises:
        LedgerError: there is no run, or a marker is damaged.
    """
    path = _first_images_part(run_uri)
    if path is None:
        return None
    filesystem, target = open_filesystem(join(run_uri, path))
    with filesystem.open(target, "rb") as file:
        names = [n for n in pq.read_schema(file).names if n != "sample_key"][:MAX_ROWS]
        file.seek(0)
        batches = pq.ParquetFile(file).iter_batches(batch_size=COLUMNS, columns=names)
        rows = next(batches).to_pylist()
    strip = Image.new("RGB", (SIDE_PX * len(rows), SIDE_PX * len(names)))
    for x, row in enumerate(rows):
        for y, name in enumerate(names):
            with Image.open(io.BytesIO(row[name]["bytes"])) as picture:
                small = picture.convert("RGB").resize((SIDE_PX, SIDE_PX))
            strip.paste(small, (x * SIDE_PX, y * SIDE_PX))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


def _first_images_part(run_uri: str) -> str | None:
    for marker in ledger.read_markers(run_uri).values():
        if "images" in marker.parts:
            return marker.parts["images"].path
    return None

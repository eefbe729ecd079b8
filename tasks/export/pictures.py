"""Pictures of a run as files."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from models.errors import ConfigError, LedgerError
from tasks.run.ledger import read_markers
from tasks.run.marker import Marker
from tasks.run.rows import picture_suffix
from tasks.run.run_json import read_declared, read_run
from tasks.storage.files import exists, file_info, join, read_bytes, write_bytes
from tasks.storage.names import file_name
from tasks.storage.part_files import open_part, part_errors

CLAIM = ".export.json"
NEXT_STEPS = {
    "input": "; `refinery rescore RUN OUT --set 'output.pictures=[\"input\"]'` reads them again "
    "from where they were, and stores them in OUT",
    "inversion": "; invert again with `inversion` among output.pictures",
}
"""Of who asks for pictures that are not stored."""
THREADS = 16
"""Files written side by side: stores answer slowly, and disks in any order."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did.

    Attributes:
        written: files of this time.
        kept: files that were there already.
    """

    written: int = 0
    kept: int = 0


def export_pictures(run_uri: str, folder: str, pictures: Sequence[str] = ()) -> Exported:
    """Write the stored pictures of the committed samples below a folder or prefix, byte for byte:
    `<sample key>`, or `<picture>/<sample key>` where there are several of each. A file that is
    there with the right size stays, so the same call goes on with what an earlier one began.

    Args:
        pictures: columns of images/; empty: the edits, of a run without edits the inversion.

    Raises:
        LedgerError: there is no run, a part is damaged, or a file cannot be written.
        ConfigError: the run has not stored such pictures, the folder holds another export, or two
            samples would share a file.
    """
    declared, config = read_declared(run_uri), read_run(run_uri)["config"]
    names = tuple(dict.fromkeys(pictures)) or declared.variants or ("inversion",)
    for name in names:
        if name not in declared.pictures:
            raise ConfigError(
                f"{run_uri} has stored no pictures {name!r}, only "
                f"{', '.join(declared.pictures) or 'codes'}{NEXT_STEPS.get(name, '')}"
            )
    _claim(folder, run_uri, names)
    suffixes = {name: picture_suffix(name, config["output"]["picture_format"]) for name in names}
    claimed: dict[str, str] = {}
    written = kept = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for marker in read_markers(run_uri).values():
            for rows in _rows(run_uri, marker, names):
                files: list[tuple[str, bytes]] = []
                for row in rows:
                    key = row["sample_key"]
                    paths = {name: file_name(key, suffix) for name, suffix in suffixes.items()}
                    path = paths[names[0]]
                    if claimed.setdefault(path, key) != key:
                        raise ConfigError(
                            f"{run_uri}: the samples {claimed[path]!r} and {key!r} would both "
                            f"become {path}; export them apart with `refinery query`"
                        )
                    inside = {n: f"{n}/{p}" for n, p in paths.items()} if names[1:] else paths
                    files += [(inside[name], row[name]["bytes"]) for name in names]
                done = list(pool.map(lambda file: _write(join(folder, file[0]), file[1]), files))
                written, kept = written + sum(done), kept + len(done) - sum(done)
    return Exported(written=written, kept=kept)


def _claim(folder: str, run_uri: str, names: Sequence[str]) -> None:
    """Say whose pictures are in the folder: the size of a file would not tell another run's."""
    uri = join(folder, CLAIM)
    mine = {"run_id": read_run(run_uri)["run_id"], "pictures": list(names)}
    if not exists(uri):
        write_bytes(uri, json.dumps(mine).encode())
    elif json.loads(read_bytes(uri, LedgerError)) != mine:
        raise ConfigError(
            f"{folder} holds another export (see {CLAIM} in it): other pictures, or another run's; "
            "choose another folder, or remove that one"
        )


def _write(uri: str, data: bytes) -> bool:
    """Whether the file had to be written. Writes are atomic, so one of the right size is whole."""
    info = file_info(uri, LedgerError)
    if info is not None and info[0] == len(data):
        return False
    write_bytes(uri, data)
    return True


def _rows(run_uri: str, marker: Marker, names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows of a shard's pictures, a row group at a time."""
    part = marker.parts.get("images")
    if part is None:
        return
    uri = join(run_uri, part.path)
    file = open_part(uri, part.bytes)
    for group in range(file.num_row_groups):
        with part_errors(uri):
            yield file.read_row_group(group, ["sample_key", *names]).to_pylist()

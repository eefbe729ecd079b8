"""What must hold after every trial, told apart from the code under test: parts are read with
pyarrow, hashed with hashlib, listed with the store's own listing."""

import hashlib
import io
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from tasks.run.ledger import PART_KINDS, read_markers
from tasks.storage.files import join, list_files, read_bytes
from tests.processes import command_line

EXIT_CODES = {0, 1, 2, 130}
"""What `refinery` may say of itself; 3 is a bug."""


def check_exit(code: int, said: str) -> list[str]:
    """A driver that ended by itself tells one line of what the user can do, or its summary."""
    found = []
    if code not in EXIT_CODES:
        found.append(f"exit code {code}: {said[-300:]}")
    if "Traceback (most" in said:
        found.append(f"traceback: {said[-300:]}")
    if code == 0 and not re.search(r"verify +clean", said):
        found.append(f"exit code 0 without a clean summary: {said[-300:]}")
    return found


def check_run(run: str, calm: str, said: str) -> list[str]:
    """A finished run against the undisturbed one: keys, hashes, bytes, nothing besides.

    Args:
        said: the output of the driver that finished it.
    """
    found: list[str] = []
    markers, wanted = read_markers(run), read_markers(calm)
    if markers.keys() != wanted.keys():
        return [f"shards {sorted(markers)} instead of {sorted(wanted)}"]
    keys: Counter[str] = Counter()
    named = set()
    for shard, marker in markers.items():
        for kind, part in marker.parts.items():
            named.add(part.path)
            data = read_bytes(join(run, part.path))
            digest = hashlib.sha256(data).hexdigest()
            if (digest, len(data)) != (part.sha256, part.bytes):
                found.append(f"{part.path} is not what its marker says")
            if digest != wanted[shard].parts[kind].sha256:
                found.append(f"{part.path} has other bytes than the undisturbed run")
            if kind == "latents":
                keys.update(pq.read_table(io.BytesIO(data))["sample_key"].to_pylist())
    wanted_keys = _keys_of(calm)
    if keys != Counter(wanted_keys):
        found.append(f"keys differ: {keys - Counter(wanted_keys)}, {Counter(wanted_keys) - keys}")
    for kind in PART_KINDS:
        names = [name for name, _, _ in list_files(join(run, kind), include_partial=True)]
        found += [f"{kind}/{n}: nobody names it" for n in names if f"{kind}/{n}" not in named]
    failed = sum(marker.failed for marker in markers.values())
    summary = f"{len(wanted_keys)} in {len(wanted)} shards, {failed} failed"
    if summary not in " ".join(said.split()):
        found.append(f"the summary does not say {summary!r}: {said[-300:]}")
    return found


def _keys_of(run: str) -> list[str]:
    found: list[str] = []
    for marker in read_markers(run).values():
        data = read_bytes(join(run, marker.parts["latents"].path))
        found += pq.read_table(io.BytesIO(data))["sample_key"].to_pylist()
    return found


def check_processes(sessions: list[int], mark: str) -> list[str]:
    """Nothing is alive of the drivers' sessions, nor of what carries the trial's mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            is_ours = session in sessions or mark.encode() in (folder / "environ").read_bytes()
        except (OSError, IndexError):
            continue
        if is_ours and (line := command_line(int(folder.name))):
            found.append(f"process {folder.name} is left: {line[:100]}")
    return found

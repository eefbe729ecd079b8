"""One level of a folder or prefix."""

import os
from typing import Any, cast

from models.errors import LedgerError
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, local_path, open_filesystem, s3_pages, scheme_of


def list_folder(uri: str, *, is_whole: bool = False) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files right below a place; none where it is missing.

    Args:
        is_whole: go on after the first thousand names of an object store, among which is what a run
            has at its top.

    Raises:
        LedgerError: storage cannot be listed.
    """
    with storage_errors("list", uri, LedgerError):
        if is_local(uri):
            if not os.path.isdir(local_path(uri)):
                return [], []
            with os.scandir(local_path(uri)) as entries:
                found = [(entry.name, entry.is_dir()) for entry in entries]
        else:
            fs, path = open_filesystem(uri)
            if scheme_of(uri) == "s3":
                return _list_s3(fs, path, is_whole)
            entries = cast(list[dict[str, Any]], fs.ls(path)) if fs.isdir(path) else []
            found = [(e["name"].rsplit("/", 1)[-1], e["type"] == "directory") for e in entries]
        return [n for n, is_dir in found if is_dir], [n for n, is_dir in found if not is_dir]


def _list_s3(fs: Any, path: str, is_whole: bool) -> tuple[list[str], list[str]]:
    folders: list[str] = []
    files: list[str] = []
    for page, prefix in s3_pages(fs, path, Delimiter="/"):
        folders += [e["Prefix"][len(prefix) : -1] for e in page.get("CommonPrefixes", ())]
        files += [e["Key"][len(prefix) :] for e in page.get("Contents", ())]
        if not is_whole:
            break
    return folders, files

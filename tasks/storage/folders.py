"""One level of a folder or prefix."""

import os
from typing import Any, cast

from models.errors import LedgerError
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, local_path, open_filesystem, scheme_of


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
            return [n for n, is_dir in found if is_dir], [n for n, is_dir in found if not is_dir]
        fs, path = open_filesystem(uri)
        if scheme_of(uri) != "s3":
            entries = cast(list[dict[str, Any]], fs.ls(path)) if fs.isdir(path) else []
            names = {e["name"].rsplit("/", 1)[-1]: e["type"] == "directory" for e in entries}
            return [n for n, is_dir in names.items() if is_dir], [
                n for n, is_dir in names.items() if not is_dir
            ]
        return _list_s3(fs, path, is_whole)


def _list_s3(fs: Any, path: str, is_whole: bool) -> tuple[list[str], list[str]]:
    bucket, _, prefix = path.partition("/")
    prefix = prefix + "/" if prefix else ""
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    folders: list[str] = []
    files: list[str] = []
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        folders += [e["Prefix"][len(prefix) : -1] for e in page.get("CommonPrefixes", ())]
        files += [e["Key"][len(prefix) :] for e in page.get("Contents", ())]
        if not is_whole or not page.get("IsTruncated"):
            return folders, files
        request["ContinuationToken"] = page["NextContinuationToken"]

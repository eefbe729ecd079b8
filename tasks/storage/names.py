"""Names of files made from sample keys, which may be anything."""

import hashlib
import re

MAX_PART_BYTES = 200
"""Of a folder's or file's name; most file systems allow 255."""
_UNSAFE = re.compile(r"[\x00-\x1f\x7f%\\\ud800-\udfff]")


def file_name(key: str, suffix: str) -> str:
    """A relative path for a sample: its key, with the suffix where it does not end with it.

    It never leads out of the folder it is joined to: "..", "." and empty parts, backslashes,
    control characters and "%" itself are written as %XX, so different keys keep different names;
    parts that are too long for a file system end with a hash instead.
    """
    whole = key if key.lower().endswith(f".{suffix}") else f"{key}.{suffix}"
    return "/".join(_part(part) for part in whole.split("/"))


def _part(part: str) -> str:
    if part in ("", ".", ".."):
        return part.replace(".", "%2E") or "%"
    part = _UNSAFE.sub(_escaped, part)
    data = part.encode()
    if len(data) <= MAX_PART_BYTES:
        return part
    stem, dot, suffix = part.rpartition(".")
    kept = stem.encode()[: MAX_PART_BYTES - 32].decode(errors="ignore")
    return f"{kept}~{hashlib.sha256(data).hexdigest()[:16]}{dot}{suffix[:10]}"


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode(errors="surrogatepass"))

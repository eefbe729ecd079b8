"""Named places where a test may kill the process, to prove that a run survives it.

    REFINERY_CRASH="in_work:3:/some/folder/token" refinery invert ...

kills the process that works on shard 3 when it first reaches `in_work`. The token file outside
the run remembers that it fired, so the re-run or the restarted worker passes. Unset, nothing
happens.
"""

import os
from pathlib import Path

from models.errors import ConfigError

VARIABLE = "REFINERY_CRASH"
POINTS = (
    "before_read",
    "in_decode",
    "in_work",
    "between_parts",
    "before_marker",
    "after_marker",
)
COMPACT_POINTS = ("compact_between_parts", "compact_before_marker", "compact_before_seal")
"""Of `refinery compact`; the shard is the one that will cover others."""
EXIT_CODE = 137
"""As of a process that the kernel killed."""


def crash_point(name: str, shard: int) -> None:
    """End the process without any clean-up when `REFINERY_CRASH` names this point and this shard.

    With a token file it fires once, otherwise every time. Several are separated by ";".

    Raises:
        ConfigError: the variable is malformed, or names no crash point.
    """
    assert name in (*POINTS, *COMPACT_POINTS)
    for wanted in os.environ.get(VARIABLE, "").split(";"):
        if wanted:
            _maybe_crash(wanted, name, shard)


def _maybe_crash(wanted: str, name: str, shard: int) -> None:
    point, _, rest = wanted.partition(":")
    number, _, token = rest.partition(":")
    if point not in (*POINTS, *COMPACT_POINTS) or not number.isdigit():
        known = ", ".join((*POINTS, *COMPACT_POINTS))
        raise ConfigError(
            f"{VARIABLE}={wanted!r}: expected point:shard or point:shard:token-file with a point "
            f"of {known} and a shard number; unset it for normal work"
        )
    if (point, int(number)) != (name, shard) or _has_fired(token):
        return
    os._exit(EXIT_CODE)


def _has_fired(token: str) -> bool:
    """Take the token: False for the one process that creates it."""
    if not token:
        return False
    try:
        # O_EXCL: of several workers at the same point, one dies.
        os.close(os.open(Path(token), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return True
    return False

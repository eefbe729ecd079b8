"""The work on pictures, codes and runs. `open_run` opens a run to read it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.catalogue.opened import open_run

__all__ = ["open_run"]


def __getattr__(name: str) -> Any:
    """`open_run` is loaded when it is asked for: importing a room costs that room alone."""
    if name == "open_run":
        from tasks.catalogue.opened import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Where files that can be made or fetched again are kept on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$REFINERY_CACHE, else $XDG_CACHE_HOME/style-refinery, else ~/.cache/style-refinery."""
    chosen = os.environ.get("REFINERY_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "style-refinery"

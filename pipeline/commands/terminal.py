"""What commands share: where they print, what they return, the arguments that recur."""

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, TextIO

from cyclopts import Parameter
from rich.console import Console

LOG_WIDTH = 160
OK, UNCLEAN, WRONG, BUG, STOPPED = 0, 1, 2, 3, 130
"""Exit codes: fine; finished with quarantined shards or problems; a setting, a file or a place is
wrong; an error of ours; stopped by Ctrl-C or SIGTERM."""


def _console(stream: TextIO, *, stderr: bool) -> Console:
    """A log file is not cut to 80 characters."""
    is_free = not stream.isatty() and "COLUMNS" not in os.environ
    # Names of files and keys may hold what rich takes for a picture, as :x:.
    return Console(stderr=stderr, width=LOG_WIDTH if is_free else None, emoji=False)


console = _console(sys.stdout, stderr=False)
error_console = _console(sys.stderr, stderr=True)


def say(text: object) -> None:
    """A line of an answer as it is: a name may hold what rich takes for markup, as [red]."""
    console.print(str(text), highlight=False, markup=False, soft_wrap=True)


In = Annotated[
    str, Parameter(name="IN", help="Pictures, WebDataset tars or Parquet: a path or s3:// prefix.")
]
Out = Annotated[str, Parameter(name="OUT", help="The run directory, a path or s3:// prefix.")]
Run = Annotated[str, Parameter(name="RUN", help="A run directory, a path or s3:// prefix.")]
Config = Annotated[str | None, Parameter(name="--config", help="TOML file.")]
Sets = Annotated[
    list[str] | None,
    Parameter(name="--set", help="Override, e.g. method.0.steps=200. May be repeated."),
]
Methods = Annotated[
    list[str] | None,
    Parameter(name="--method", help="Method chain: --method e4e --method wplus."),
]
Align = Annotated[
    bool,
    Parameter(
        name="--align",
        help="IN holds photographs: find faces (extra `faces`), bring each onto the generator's "
        "template; short for --set input.fit=align --set input.detector=mtcnn.",
        negative=(),
    ),
]
Limit = Annotated[int | None, Parameter(name="--limit", help="Only the first samples.")]
Engine = Annotated[
    Literal["ray", "inline"] | None,
    Parameter(
        name="--engine",
        help="Where the shards run; inline is a loop in this process, for debugging.",
    ),
]
Flow = Annotated[
    bool | None,
    Parameter(
        name="--flow",
        negative="--no-flow",
        help="Run as a Prefect flow; by default where a Prefect server is named (PREFECT_API_URL "
        "or a profile). Without one, --flow starts a private server for the length of the run.",
    ),
]


Force = Annotated[
    bool,
    Parameter(name="--force", help="Take the run from another driver that is at work on it."),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What every command takes that runs a job."""

    config: Config = None
    sets: Sets = None
    engine: Engine = None
    limit: Limit = None
    flow: Flow = None
    force: Force = False

    @property
    def overrides(self) -> list[str]:
        """The settings of --set, --engine and --force."""
        engine = [f"engine.kind={self.engine}"] if self.engine else []
        force = ["engine.if_busy=take"] if self.force else []
        return [*(self.sets or []), *engine, *force]


DEFAULTS = JobOptions()
ALIGN_SETS = ("input.fit=align", "input.detector=mtcnn")
"""What --align stands for; what --set says comes after it."""

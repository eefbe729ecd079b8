"""What tidies a finished run, by the driver that holds it."""

from models.errors import ConfigError
from pipeline import run as stages
from tasks.run import ledger, run_json
from tasks.run.compact import Compacted
from tasks.run.compact import compact as compact_parts
from tasks.run.lease import hold
from tasks.run.metadata import remove_superseded


def compact(run_uri: str, target_bytes: int) -> Compacted:
    """Give small shards common parts, and seal the run anew.

    Raises:
        ConfigError: the size is not above zero.
        LedgerError: there is no run, it is not sealed, another driver is at work on it, or a part
            is damaged.
    """
    if target_bytes <= 0:
        raise ConfigError(f"target is {target_bytes} bytes; expected more than 0")
    run_json.read_run(run_uri)
    with hold(run_uri):
        found = compact_parts(run_uri, target_bytes)
        stages.seal(run_uri)
    return found


def collect(run_uri: str, older_than_s: float) -> list[str]:
    """Remove what no commit names, and metadata that later ones stand for.

    Returns:
        The removed paths, relative to the run.

    Raises:
        ConfigError: the age is below zero.
        LedgerError: there is no run, or another driver is at work on it.
    """
    if not older_than_s >= 0:
        raise ConfigError(f"older-than is {older_than_s / 3600:g} hours; expected 0 or more")
    run_json.read_run(run_uri)
    with hold(run_uri):
        removed = ledger.remove_orphans(run_uri, older_than_s)
        return [*removed, *remove_superseded(run_uri, older_than_s)]

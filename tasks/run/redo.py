"""Which committed shards of a run are worth another try, because of the rows that failed."""

from models.errors import ConfigError, LedgerError
from tasks.run.ledger import open_shard, read_commits
from tasks.run.query import query
from tasks.run.source import read_rows


def shards_to_redo(run_uri: str, where: str | None = None) -> dict[int, int]:
    """Shards with failed rows, and the generation in which each may be committed again.

    Args:
        where: SQL condition on `latents`; only shards with a failed row that meets it.

    Raises:
        LedgerError: there is no run, or it was compacted.
        ConfigError: the condition is wrong, or no failed row meets it.
    """
    commits = read_commits(run_uri)
    if commits.compacted:
        raise LedgerError(
            f"{run_uri}: compacted, so its shards are not apart any more; retry before `refinery "
            "compact`, or invert what failed into a run of its own"
        )
    markers = {shard: marker for shard, marker in commits.markers.items() if marker.failed}
    if where is not None and markers:
        wanted = f"SELECT sample_key FROM latents WHERE status = 'failed' AND ({where})"
        keys = set(query(run_uri, wanted).column("sample_key").to_pylist())
        markers = {
            shard: marker
            for shard, marker in markers.items()
            if any(row.sample_key in keys for row in read_rows(run_uri, marker))
        }
        if not markers:
            raise ConfigError(
                f"{run_uri}: no failed row meets --where {where}; see `refinery query RUN "
                "\"SELECT sample_key, error_kind, error FROM latents WHERE status = 'failed'\"`"
            )
    return {shard: open_shard(run_uri, shard)[0] for shard in markers}

"""Commands that tidy a finished run. Heavy imports wait inside, so that --help is immediate."""

from pipeline.commands.terminal import OK, Run, say


def compact(run: Run, /, *, target_mb: float = 128.0) -> int:
    """Give the small shards of a finished run common files: fewer to open, the same rows.

    The files before stay for a day, for those who are reading them; `refinery gc` removes them
    then.

    Args:
        target_mb: size of the files of a shard together, MB; they are held in memory.
    """
    from pipeline.upkeep import compact as compact_run

    found = compact_run(run, int(target_mb * 1e6))
    text = f"{run}: {found.parts_before} files before, {found.parts_after} now"
    say(text)
    return OK


def gc(run: Run, /, *, older_than_h: float = 24.0) -> int:
    """Remove files of a run that no commit names: of attempts that died, of what was compacted.

    Args:
        older_than_h: keep what could still be at work or be read for so many hours. An attempt
            that is at work all the same is sent back, and does its shard again.
    """
    from pipeline.upkeep import collect

    removed = collect(run, older_than_h * 3600)
    for path in removed:
        say(path)
    say(f"{run}: {len(removed)} files removed")
    return OK

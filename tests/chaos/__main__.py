"""`make chaos`: seeded trials of every kind of fault, a table, and a JSON file of what happened.

    python -m tests.chaos --trials 300 --seed 1 --out chaos.json
    python -m tests.chaos --table chaos.json more.json

Exit status 1 when an invariant was violated; `--only FAULT --seed N` repeats a trial.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.faults import QUICK, RAYS, ROOTS, Trial, can_do
from tests.chaos.site import KINDS, Site

RAY_SHARE = 6
"""Every so many trials one with a Ray of its own."""


@dataclass(frozen=True)
class Record:
    """How one trial went."""

    fault: str
    kind: str
    seed: int
    hits: int
    seconds: float
    problems: list[str]


def planned(
    trials: int, seed: int, only: list[str], *, with_ray: bool
) -> Iterator[tuple[str, int]]:
    """Names of faults and seeds: all kinds in turn."""
    quick = [fault for fault in (*QUICK, *ROOTS) if can_do(fault)]
    in_ray = [fault for fault in RAYS if can_do(fault)]
    if only:
        yield from ((only[n % len(only)], seed + n) for n in range(trials))
        return
    rays, quicks = 0, 0
    for number in range(trials):
        if with_ray and number % RAY_SHARE == RAY_SHARE - 1:
            yield in_ray[rays % len(in_ray)], seed + number
            rays += 1
        else:
            yield quick[quicks % len(quick)], seed + number
            quicks += 1


def run_trial(site: Site, fault: str, seed: int, kind: str) -> Record:
    """One trial; what it raises itself is a problem, too."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=site.folder) as folder:
        trial = Trial(site, fault, seed, kind, Path(folder))
        try:
            (QUICK | ROOTS | RAYS)[fault](trial)
        except Exception as error:
            trial.problems.append(f"{type(error).__name__}: {error}")
        finally:
            for driver in trial.drivers:
                if driver.process.is_alive():
                    driver.process.kill()
                    driver.process.join(30)
    seconds = round(time.monotonic() - began, 1)
    return Record(fault, trial.kind, seed, trial.hits, seconds, trial.problems)


def table(records: list[Record]) -> str:
    """Markdown: trials, those in which the fault struck, violations."""
    lines = ["| fault | trials | struck | violations |", "|---|---|---|---|"]
    counts, struck, bad = Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        counts[record.fault] += 1
        struck[record.fault] += record.hits > 0
        bad[record.fault] += bool(record.problems)
    lines += [f"| {f} | {counts[f]} | {struck[f]} | {bad[f]} |" for f in sorted(counts)]
    total = f"| all | {counts.total()} | {struck.total()} | {bad.total()} |"
    return "\n".join([*lines, total])


def main(words: list[str] | None = None) -> int:
    """Run the trials; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", default=[], choices=[*QUICK, *ROOTS, *RAYS])
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--table", type=Path, nargs="+", help="of earlier trials; make none")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start none after")
    wanted = parser.parse_args(words)
    if wanted.table:
        found = [json.loads(path.read_text())["trials"] for path in wanted.table]
        print(table([Record(**record) for trials in found for record in trials]))  # noqa: T201
        return 0
    began, records = time.monotonic(), list[Record]()
    with tempfile.TemporaryDirectory(prefix="refinery-chaos-") as folder:
        site = Site.make(Path(folder))
        try:
            plan = planned(wanted.trials, wanted.seed, wanted.only, with_ray=not wanted.no_ray)
            for number, (fault, seed) in enumerate(plan):
                if time.monotonic() - began > wanted.limit_s:
                    break
                record = run_trial(site, fault, seed, KINDS[number % len(KINDS)])
                records.append(record)
                verdict = "; ".join(record.problems) or "ok"
                print(f"{fault} {record.kind} {seed} {record.seconds} s: {verdict}", flush=True)  # noqa: T201
                if wanted.out:
                    wanted.out.write_text(json.dumps(_result(wanted.seed, records), indent=1))
        finally:
            site.close()
    print(table(records))  # noqa: T201
    return int(any(record.problems for record in records))


def _result(seed: int, records: list[Record]) -> dict[str, object]:
    return {
        "seed": seed,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "trials": [asdict(record) for record in records],
    }


if __name__ == "__main__":
    sys.exit(main())

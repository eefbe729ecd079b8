"""Coverage-guided fuzzing of every reader of foreign bytes, with atheris (libFuzzer).

    python -m tests.fuzz_guided 20000            # of each reader; also `make fuzz ARGS=20000`
    python -m tests.fuzz_guided 20000 tar pkl    # of some

A process for each reader. It ends at the first exception that is not ours, at an input that takes
more than 5 s, or beyond 4 GiB; the input stays in the folder that is named then. The figures go to
benchmarks/reliability-fuzz.json.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "benchmarks" / "reliability-fuzz.json"
INSTRUMENTED = ["tasks.input", "tasks.run", "models.checkpoints", "pipeline.config", "tarfile"]
MOST_SECONDS, MOST_MB, MOST_BYTES = 5, 4096, 2**17
SHARE_GUIDED = 0.5
"""Of the inputs; the others come from the mutator that knows fields and checksums."""


def fuzz(name: str, runs: int, folder: Path) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzzing import READERS, check, mutate, repaired

    reader, rng = READERS[name], random.Random(0)
    place = folder / "place"
    place.mkdir()
    seeds = reader.seeds(place)
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(seeds):
        (corpus / str(index)).write_bytes(seed)
    done, slowest = 0, 0.0
    os.chdir(place)
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        nonlocal done, slowest
        slowest = max(slowest, check(reader, data, place))
        done += 1
        if done == runs:
            (folder / "found.json").write_text(json.dumps({"slowest_s": round(slowest, 3)}))
            os._exit(0)

    def change(data: bytes, most: int, seed: int) -> bytes:
        if rng.random() < SHARE_GUIDED:
            return repaired(bytes(atheris.Mutate(data, most)))[:most]
        return mutate(data, seeds, rng)[:most]

    limits = {"timeout": 2 * MOST_SECONDS, "rss_limit_mb": MOST_MB, "max_len": MOST_BYTES}
    flags = [f"-{key}={value}" for key, value in limits.items()]
    command = ["fuzz", f"-artifact_prefix={folder}/", "-seed=1", *flags, str(corpus)]
    atheris.Setup(command, one, custom_mutator=change)
    atheris.Fuzz()


def main(runs: int, names: list[str]) -> int:
    """Fuzz readers one after the other.

    Returns:
        The exit code.
    """
    from tests.fuzzing import READERS

    crashes = 0
    for name in names or READERS:
        folder = Path(tempfile.mkdtemp(prefix=f"refinery-fuzz-{name}-"))
        command = [sys.executable, "-m", "tests.fuzz_guided", str(runs), name, str(folder)]
        started = time.monotonic()
        with (folder / "log").open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        found = folder / "found.json"
        is_clean = code == 0 and found.exists()
        crashes += not is_clean
        figures = {
            "inputs": runs if is_clean else None,
            "crashes": 0 if is_clean else 1,
            "seconds": round(time.monotonic() - started),
            **(json.loads(found.read_text()) if is_clean else {}),
        }
        state = "clean" if is_clean else f"exit {code}: see {folder}"
        sys.stdout.write(f"{name}: {runs} inputs, {state}\n")
        sys.stdout.flush()
        _keep(name, figures)
    return 1 if crashes else 0


def _keep(name: str, figures: dict[str, object]) -> None:
    """Put the figures of one reader into the file, in place of what it had."""
    record = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"readers": {}}
    record |= {
        "command": "make fuzz ARGS=<inputs of each reader>",
        "engine": f"atheris {version('atheris')}",
        "limits": {"seconds": MOST_SECONDS, "rss_mb": MOST_MB},
    }
    record["readers"][name] = figures
    FIGURES.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    count, *more = sys.argv[1:]
    if more and Path(more[-1]).is_dir():
        fuzz(more[0], int(count), Path(more[-1]))
    else:
        sys.exit(main(int(count), more))

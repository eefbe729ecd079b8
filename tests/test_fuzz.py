"""A few hundred broken files for each reader of foreign bytes: errors of ours, or none.

`make fuzz ARGS=20000` does as many of each as it is told, led by coverage.
"""

import random
from pathlib import Path

import pytest

from tests.fuzzing import READERS, check, mutate

INPUTS = 200


@pytest.mark.parametrize("name", READERS)
def test_broken_files_raise_errors_of_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader, rng = READERS[name], random.Random(f"{name} 1")
    seeds = reader.seeds(tmp_path)
    for seed in seeds:
        check(reader, seed, tmp_path)
    for number in range(INPUTS):
        data = mutate(rng.choice(seeds), seeds, rng)
        try:
            check(reader, data, tmp_path)
        except Exception as problem:
            problem.add_note(f"input {number} of {name}: {len(data)} bytes {data[:2000]!r}")
            raise

"""Tables that give each sample its own domain."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ConfigError
from models.stylegan2.generator import Generator
from tasks.work.assignment import read_assignment
from tests.tasks.small_edit import (
    make_edit_job,
    make_source,
    run_edits,
    variant,
    write_domain,
)
from tests.tasks.work.test_edit import pictures


def test_tables_of_both_kinds(tmp_path: Path) -> None:
    csv, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    csv.write_text("sample_key,domain,strength\n7,oil,0.5\nb.png,ink,1\n")
    pq.write_table(pa.table({"sample_key": ["7", "b.png"], "domain": ["oil", "ink"]}), parquet)
    found = read_assignment(str(csv))
    assert found.by_key == {"7": ("oil", 0.5), "b.png": ("ink", 1.0)}
    assert found.domains == ("ink", "oil")
    assert read_assignment(str(parquet)).by_key == {"7": ("oil", 1.0), "b.png": ("ink", 1.0)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("key,domain\na,oil\n", "has no column sample_key, only key, domain"),
        ("sample_key,domain\na,oil\na,ink\n", "the sample a stands twice"),
        ("sample_key,domain\na,\n", r"row 0 \(a\): expected a domain"),
        ("sample_key,domain,strength\na,oil,much\n", "found 'oil' and 'much'"),
        ("", "not a table"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_assignment(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        read_assignment(str(tmp_path / "nothing.csv"))


def test_rows_of_one_batch_carry_their_own_domains(
    tiny_generator: Generator, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    source = make_source(tiny_generator, tmp_path, face_bytes)
    folder = tmp_path / "domains"
    oil, ink = (write_domain(tiny_generator, folder / name) for name in ("oil", "ink-wash"))
    table = tmp_path / "styles.csv"
    table.write_text(
        f"sample_key,domain,strength\nface-0.png,oil,0.7\nface-1.png,{ink},1\nother.png,oil,1\n"
    )
    job = make_edit_job(
        source,
        variant("own", assigned=str(table)),
        variant("oil", domains={oil: 0.7}),
        variant("ink", domains={ink: 1.0}),
        variant("more", domains={oil: 0.7}, assigned=str(table)),
        variant("twice", domains={oil: 1.4}),
        domain_folders=(str(folder),),
    )
    run_edits(str(tmp_path / "out"), job)
    found = pictures(str(tmp_path / "out"))
    twins = {"face-0.png": "oil", "face-1.png": "ink", "face-2.png": "inversion"}
    for key, twin in twins.items():
        difference = np.abs(found["own"][key].astype(int) - found[twin][key].astype(int))
        assert difference.max() <= 1, key
    assert np.abs(found["oil"]["face-1.png"].astype(int) - found["own"]["face-1.png"]).max() > 10
    both = np.abs(found["more"]["face-0.png"].astype(int) - found["twice"]["face-0.png"])
    assert both.max() <= 1

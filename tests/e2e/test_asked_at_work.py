"""Questions to an index that Ray's workers are making while they are killed: every answer is right
for what was committed when it was asked."""

from pathlib import Path

import numpy as np
import pytest

from models.errors import LedgerError
from pipeline.config import load_stored_config
from pipeline.run import carry_out
from pipeline.tally import TallySnapshot
from tasks import open_run
from tasks.run.ledger import read_markers
from tasks.run.query import query
from tasks.similar import open_index
from tests.e2e.small_dataset import fingerprint, index_inline
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server

POINTS = ("before_read", "between_parts", "before_marker", "after_marker")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("store", ["local", "s3"])
def test_right_answers_while_workers_are_killed(
    store: str, undisturbed: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = f"{s3}/index" if store == "s3" else str(tmp_path / "index")
    run = open_run(undisturbed)
    codes = dict(zip(run.keys(), run.codes().reshape(len(run.keys()), -1), strict=True))
    codes = {key: code.astype(np.float16).astype(np.float32) for key, code in codes.items()}
    asked = next(iter(codes.values()))
    sizes: list[int] = []

    def ask(snapshot: TallySnapshot) -> None:
        try:
            opened = open_index(index, undisturbed)
        except LedgerError as error:
            if "nothing is indexed yet" not in str(error):
                raise
            return
        (found,) = opened.search(asked[None], 20)
        keys = found["sample_key"].to_pylist()
        assert len(set(keys)) == len(keys) == len(opened)
        apart = {key: float(np.linalg.norm(codes[key] - asked)) for key in keys}
        assert found["distance"].to_pylist() == pytest.approx(sorted(apart.values()), abs=1e-3)
        assert [apart[key] for key in keys] == pytest.approx(sorted(apart.values()), abs=1e-3)
        rows = query(index, "SELECT sample_key, status FROM samples").to_pylist()
        there = {row["sample_key"] for row in rows if row["status"] == "ok"}
        assert len({row["sample_key"] for row in rows}) == len(rows)
        assert set(keys) <= there <= codes.keys()  # a shard may have come between the two questions
        sizes.append(len(keys))

    tokens = {point: tmp_path / point for point in POINTS}
    crashes = [f"{point}:{shard}:{tokens[point]}" for shard, point in enumerate(POINTS, 1)]
    monkeypatch.setenv("REFINERY_CRASH", ";".join(crashes))
    sets = ["batch=2", "engine.actors=1", "engine.max_attempts=8", "engine.retry_wait_s=0.1"]
    config = load_stored_config("index", undisturbed, None, sets)
    summary = carry_out(undisturbed, index, config, on_progress=ask)

    assert all(token.exists() for token in tokens.values())
    assert summary.is_clean
    assert sizes == sorted(sizes)
    assert sizes[-1] == 11
    assert len(set(sizes)) > 2, "never asked in the middle"
    calm = str(tmp_path / "calm")
    assert index_inline(undisturbed, calm).is_clean
    assert fingerprint(index) == fingerprint(calm)


def test_requests_of_a_question_to_an_index_at_work(
    undisturbed: str, s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = f"{s3}/index"
    assert index_inline(undisturbed, index).is_clean
    shards = len(read_markers(index))
    with s3_proxy(s3_server.endpoint) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        opened = open_index(index)
        # Is it there, run.json, two listings, the markers' file, the projection twice; the codes.
        assert store.requests.total() <= 8 + shards, store.paths
        store.forget()
        (found,) = opened.search(
            opened.vectors(opened.samples(np.arange(1))["sample_key"].to_pylist()), 3
        )
        assert found.num_rows == 3
        assert store.requests.total() <= 1 + len(opened), store.paths

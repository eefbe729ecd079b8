"""How well and how fast `refinery similar` answers, beside other libraries on the same codes.

Run: python -m benchmarks.similar --run RUN [--rows 10000 100000 1000000] [--only NAME ...]

RUN is a finished run of the shared faces (`refinery invert faces RUN --method e4e`). Its codes are
the real ones; every second of the questions is one of them, held out. More rows are drawn from a
normal distribution with the mean and the leading directions of the real codes, which says nothing
about faces but fills the space as faces do. All libraries get the same 128 directions and the same
exact re-ranking; those with a knob are turned up until they find as much.

"store" among --only uploads each size that is asked for to the S3 servers of tests: moto's, and
Ceph's gateway where it is installed.

Writes benchmarks/similar.json, benchmarks/similar.svg and the section "Similarity" of
benchmarks/query.md. A part that is not measured again stays as it was.
"""

import argparse
import http.client
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.loglog import loglog
from benchmarks.query import command_seconds
from benchmarks.sections import write_section
from tasks.benchmark.machine import describe_machine
from tasks.run import ledger
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker, Part
from tasks.run.metadata import FOLDER, write_metadata
from tasks.run.parts import ENDINGS, Layout, to_arrow, write_parts
from tasks.run.query import query
from tasks.run.rows import Row
from tasks.run.run_json import Declared, create_run
from tasks.run.vectors import NPY_HEADER, Exact, Projection
from tasks.similar import index as similar_index
from tasks.similar.index import READERS, RERANKED, SCANNED, SKETCHED, Index, open_index
from tasks.storage.files import open_filesystem
from tasks.work.index import Indexer, IndexJob
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server
from tests.services import ceph

HERE = Path(__file__).parent
SHARD = 10_000
SPECTRUM = 384
"""Directions of the real codes that made-up ones vary in."""
WIDE = 1_000_000
"""Rows up to which vectors are whole codes; beyond, their coordinates along `SPECTRUM` directions,
which are as far apart in a third of the room."""
QUESTIONS = 100
BUILT = 1_000_000
BUILD_S = 120.0
"""After so long a library's building is given up."""
K = 10
WANTED = 0.99
KEPT = "q.npz"
SCAN = "refinery, first questions"
Search = Callable[[np.ndarray], list[np.ndarray]]
"""Projected questions [Q P] to row numbers of candidates, for each."""


@dataclass
class Codes:
    """A folder with an index's parts, the questions and their true answers.

    Attributes:
        asked: float32 [Q E].
        truth: rows of the K nearest by the exact vectors, [Q K].
        is_real: which questions are real codes.
    """

    index: Index
    asked: np.ndarray
    truth: np.ndarray
    is_real: np.ndarray
    bytes_per_row: float

    @cached_property
    def projected(self) -> np.ndarray:
        """float32 [N P], what the other libraries index."""
        return np.load(Path(self.index.uri) / "projected.npy")

    def recall(self, found: list[np.ndarray], only: np.ndarray | None = None) -> float:
        """Share of the true neighbours among those found."""
        hits = [
            len({*truth.tolist()} & {*rows.tolist()}) / K
            for truth, rows in zip(self.truth, found, strict=True)
        ]
        return float(np.mean(np.array(hits)[slice(None) if only is None else only]))

    def reranked(self, candidates: list[np.ndarray]) -> list[np.ndarray]:
        """The K nearest of the candidates by the exact vectors."""
        found = []
        for question, rows in zip(self.asked, candidates, strict=True):
            rows = np.sort(rows[rows >= 0])
            distance = np.linalg.norm(self.index.take(rows) - question, axis=1)
            found.append(rows[np.argsort(distance)[:K]])
        return found


def real_codes(run: str) -> np.ndarray:
    """float32 [N E] of a run, by sample key."""
    found = query(run, "SELECT w_plus FROM latents WHERE status = 'ok' ORDER BY sample_key")
    flat = found["w_plus"].combine_chunks().flatten().to_numpy()
    return flat.reshape(found.num_rows, -1).astype(np.float32)


def make_codes(real: np.ndarray, rows: int, folder: Path) -> Codes:
    """An index of `rows` codes in parts of `SHARD`: the real ones first, then made-up ones."""
    if (folder / KEPT).exists():
        return _kept(folder)
    rng = np.random.default_rng(0)
    held_out = rng.permutation(len(real))[: QUESTIONS // 2]
    known = np.delete(real, held_out, 0)[:rows]
    mean = known.mean(0)
    _, deviation, directions = np.linalg.svd(known - mean, full_matrices=False)
    deviation, directions = deviation[:SPECTRUM] / len(known) ** 0.5, directions[:SPECTRUM]
    if rows > WIDE:
        real, known = ((each - mean) @ directions.T for each in (real, known))
        mean, directions = np.zeros(SPECTRUM, np.float32), np.eye(SPECTRUM, dtype=np.float32)

    def made_up(count: int) -> np.ndarray:
        normal = rng.standard_normal((count, len(deviation)), dtype=np.float32)
        return (normal * deviation.astype(np.float32)) @ directions + mean

    projection = Projection.fit(known, directions[:128])
    asked = np.concatenate([real[held_out], made_up(QUESTIONS - len(held_out))])
    asked = asked.astype(np.float16).astype(np.float32)
    nearest = np.full((QUESTIONS, K), np.inf, np.float32)
    truth = np.full((QUESTIONS, K), -1)
    width = len(projection.component)
    projected = np.empty((rows if rows <= WIDE else 0, width), np.float32)
    for first in range(0, rows, SHARD):
        count = min(SHARD, rows - first)
        exact = known[first : first + count]
        exact = np.concatenate([exact, made_up(count - len(exact))]).astype(np.float16)
        wide = exact.astype(np.float32)
        if len(projected):
            projected[first : first + count] = projection.project(wide)
        _write(folder, first, exact, projection.encode(wide))
        distance = (wide**2).sum(1) - 2 * asked @ wide.T + (asked**2).sum(1)[:, None]
        every = np.concatenate([nearest, distance], 1)
        order = np.argpartition(every, K, 1)[:, :K]
        numbers = np.concatenate(
            [truth, np.tile(np.arange(first, first + count), (QUESTIONS, 1))], 1
        )
        nearest = np.take_along_axis(every, order, 1)
        truth = np.take_along_axis(numbers, order, 1)
    projection.write(str(folder))
    np.save(folder / "projected.npy", projected)
    is_real = np.arange(QUESTIONS) < len(held_out)
    np.savez(folder / KEPT, asked=asked, truth=truth, real=is_real)
    return _kept(folder)


def _kept(folder: Path) -> Codes:
    """What an earlier call has made."""
    questions = np.load(folder / KEPT)
    index = open_parts(str(folder))
    size = sum(path.stat().st_size for path in folder.glob("*.vectors"))
    return Codes(
        index=index,
        asked=questions["asked"],
        truth=questions["truth"],
        is_real=questions["real"],
        bytes_per_row=size / len(index),
    )


def _write(
    folder: Path,
    first: int,
    exact: np.ndarray,
    encoded: dict[str, np.ndarray],
) -> None:
    count = len(exact)
    table = pa.table(
        {
            "sample_key": [_key(first // SHARD, n) for n in range(count)],
            "psnr": np.random.default_rng(first).random(count, np.float32) * 100,
            **{
                name: pa.FixedSizeListArray.from_arrays(
                    pa.array(encoded[name].reshape(-1)),
                    type=pa.list_(pa.field("element", pa.uint8()), encoded[name].shape[1]),
                )
                for name in ("sketch", "code")
            },
        }
    )
    (folder / f"{first}.vectors").write_bytes(to_arrow(table))
    with (folder / f"{first}.exact").open("wb") as file:
        np.save(file, exact)


def open_parts(folder: str) -> Index:
    """The parts of a folder as an index, without a ledger."""
    projection = Projection.read(folder)
    assert projection is not None
    exact, vectors, width = [], [], 2 * len(projection.mean)
    for path in sorted(Path(folder).glob("*.exact"), key=lambda each: int(each.stem)):
        other = path.with_suffix(".vectors")
        size, rows = path.stat().st_size, (path.stat().st_size - NPY_HEADER) // width
        exact.append(Part(path=path.name, rows=rows, bytes=size, sha256="0" * 64))
        vectors.append(
            Part(path=other.name, rows=rows, bytes=other.stat().st_size, sha256="0" * 64)
        )
    return Index(
        uri=folder,
        source=folder,
        space="w_plus",
        projection=projection,
        tables=similar_index.open_parts(folder, vectors),
        parts=vectors,
        exact=Exact(folder, exact),
    )


def _key(shard: int, number: int) -> str:
    return f"train64-{shard:03d}.parquet:{number:06d}"


def with_ledger(folder: Path, index: Index) -> Path:
    """The same parts as a sealed run, for `open_index`."""
    place = folder / "run"
    if ledger.is_sealed(str(place)):
        return place
    job = IndexJob(source="benchmark", source_run="0" * 16, generator="", method="e4e")
    info = ManifestInfo(
        num_shards=len(index.tables), num_samples=len(index), num_bytes=0, sha256="0" * 64
    )
    declared = Declared(
        kind="index",
        stages=("read", "embed", "write"),
        stores_doors=False,
        method="e4e",
        metrics=("psnr",),
        pictures=(),
    )
    run = create_run(str(place), job, info, {}, "benchmark", declared)
    layout = Layout(method="e4e", metrics=("psnr",), shape=(10, 128), output=job.output)
    kinds = zip(index.parts, index.exact.parts, strict=True)
    for shard, (table, (vectors, exact)) in enumerate(zip(index.tables, kinds, strict=True)):
        scores = enumerate(table["psnr"].to_pylist())
        rows = [
            Row(
                sample_key=_key(shard, n),
                metrics={"psnr": psnr},
                image_uri="",
                image_sha256=None,
                seed=0,
            )
            for n, psnr in scores
        ]
        parts = write_parts(rows, layout, run, shard, "a" * 12)
        for kind, part in (("vectors", vectors), ("exact", exact)):
            path = f"{kind}/{shard:05d}-{'a' * 12}.{ENDINGS[kind]}"
            (place / kind).mkdir(exist_ok=True)
            os.link(folder / part.path, place / path)
            parts[kind] = replace(part, path=path)
        marker = Marker(
            shard=shard,
            attempt="a" * 12,
            run_id=run.run_id,
            rows=len(rows),
            failed=0,
            parts=parts,
            seconds={"embed": 0.0},
            wall_s=0.0,
            failures={},
        )
        ledger.write_marker(run.uri, marker)
    index.projection.write(run.uri)
    ledger.seal(run.uri)
    write_metadata(run.uri)
    return place


# ---------------------------------------------------------------------------- the libraries


@dataclass
class Peer:
    """How one of them is built and asked.

    Attributes:
        build: from the codes: its search at a setting of the knob.
        knob: settings from fast to thorough; the first that finds enough is timed.
        bytes_each: of a vector.
    """

    build: Callable[[Codes, Path], Callable[[Any], Search]]
    knob: tuple[Any, ...] = (None,)
    bytes_each: Callable[[Codes], float] = field(default=lambda codes: 4.0 * 128)


class OutOfTimeError(Exception):
    """A library was not built after `BUILD_S`; the argument is how many rows it had then."""


def _faiss_flat(codes: Codes, folder: Path) -> Callable[[Any], Search]:
    import faiss

    index = faiss.IndexFlatL2(128)
    index.add(codes.projected)
    return lambda knob: lambda asked: list(index.search(asked, RERANKED)[1])


def _faiss_ivf(codes: Codes, folder: Path) -> Callable[[Any], Search]:
    import faiss

    lists = int(4 * len(codes.index) ** 0.5)
    index = faiss.index_factory(128, f"IVF{lists},SQ8")
    index.train(codes.projected[:: max(1, len(codes.projected) // (50 * lists))])
    index.add(codes.projected)

    def at(knob: int) -> Search:
        index.nprobe = knob  # pyright: ignore[reportAttributeAccessIssue]
        return lambda asked: list(index.search(asked, RERANKED)[1])

    return at


def _usearch(codes: Codes, folder: Path) -> Callable[[Any], Search]:
    from usearch.index import Index as Graph

    graph = Graph(ndim=128, metric="l2sq", dtype="i8", connectivity=16, expansion_add=64)
    # Its 8-bit type takes integers as they are.
    rounded = np.rint(codes.projected).clip(-127, 127).astype(np.int8)
    stop = time.perf_counter() + BUILD_S
    for first in range(0, len(rounded), SHARD):
        if time.perf_counter() > stop:
            raise OutOfTimeError(first)
        some = rounded[first : first + SHARD]
        graph.add(np.arange(first, first + len(some)), some)

    def at(knob: int) -> Search:
        graph.expansion_search = knob

        def search(asked: np.ndarray) -> list[np.ndarray]:
            rounded = np.rint(asked).clip(-127, 127).astype(np.int8)
            keys = graph.search(rounded, min(knob, RERANKED)).keys
            return list(np.atleast_2d(keys).astype(np.int64))

        return search

    return at


def _lancedb(codes: Codes, folder: Path) -> Callable[[Any], Search]:
    import lancedb

    kind = pa.list_(pa.float32(), 128)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(codes.projected.reshape(-1)), type=kind)
    data = pa.table({"row": np.arange(len(codes.projected)), "vector": vectors})
    table = lancedb.connect(str(folder / "lance")).create_table("codes", data, mode="overwrite")
    table.create_index(
        metric="l2",
        vector_column_name="vector",
        index_type="IVF_PQ",
        num_partitions=max(1, int(len(codes.projected) ** 0.5)),
        num_sub_vectors=64,
    )

    def at(knob: int) -> Search:
        def search(asked: np.ndarray) -> list[np.ndarray]:
            return [
                table.search(each)
                .nprobes(knob)  # pyright: ignore[reportAttributeAccessIssue]
                .limit(RERANKED)
                .select(["row"])
                .to_arrow()["row"]
                .to_numpy()
                for each in asked
            ]

        return search

    return at


def _duckdb(codes: Codes, folder: Path) -> Callable[[Any], Search]:
    import duckdb

    connection = duckdb.connect()
    kind = pa.list_(pa.float32(), 128)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(codes.projected.reshape(-1)), type=kind)
    connection.register(
        "given", pa.table({"number": np.arange(len(codes.projected)), "vector": vectors})
    )
    connection.execute(
        "CREATE TABLE codes AS SELECT number, vector::FLOAT[128] AS vector FROM given"
    )
    sql = (
        f"SELECT number FROM codes ORDER BY array_distance(vector, ?::FLOAT[128]) LIMIT {RERANKED}"
    )

    def search(asked: np.ndarray) -> list[np.ndarray]:
        answers = (connection.execute(sql, [each.tolist()]).fetchnumpy() for each in asked)
        return [np.asarray(answer["number"]) for answer in answers]

    return lambda knob: search


def _plain(codes: Codes, folder: Path) -> Callable[[Any], Search]:
    import pandas as pd

    kind = pa.list_(pa.float32(), 128)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(codes.projected.reshape(-1)), type=kind)
    pq.write_table(pa.table({"vector": vectors}), folder / "plain.parquet")
    frame = pq.read_table(folder / "plain.parquet").to_pandas()
    matrix = np.stack(frame["vector"].to_list())
    squares = (matrix**2).sum(1)

    def search(asked: np.ndarray) -> list[np.ndarray]:
        apart = (pd.Series(squares - 2 * (matrix @ each)) for each in asked)
        return [each.nsmallest(RERANKED).index.to_numpy() for each in apart]

    return lambda knob: search


PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LIBRARIES = {
    "faiss flat, float32": Peer(_faiss_flat),
    "faiss IVF, 8 bit": Peer(_faiss_ivf, PROBES, lambda codes: 128 + 8.0),
    "usearch HNSW, 8 bit": Peer(
        _usearch, (32, 64, 128, 256, 512, 1024), lambda codes: 128 + 4.0 * 16 * 2 + 16
    ),
    "LanceDB IVF_PQ": Peer(_lancedb, PROBES, lambda codes: 512 + 64.0),
    "DuckDB array_distance": Peer(_duckdb),
    "pyarrow, pandas": Peer(_plain),
}


# ---------------------------------------------------------------------------- measuring


def timed(ask: Callable[[], Any], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median milliseconds by the clock, and of processors, of the rounds after those that warm
    up."""
    wall, work = [], []
    for _ in range(warm_up):
        ask()
    for _ in range(rounds):
        clock, busy = time.perf_counter(), time.process_time()
        ask()
        wall.append(time.perf_counter() - clock)
        work.append(time.process_time() - busy)
    return {"ms": 1e3 * statistics.median(wall), "cpu_ms": 1e3 * statistics.median(work)}


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def ours(codes: Codes, rounds: int) -> dict[str, Any]:
    """`Index.search`: alone, in batches, under a filter."""
    index, asked = codes.index, codes.asked

    def rows(vectors: np.ndarray) -> list[np.ndarray]:
        names = (found["sample_key"].to_pylist() for found in index.search(vectors, K))
        places = ([name[len("train64-") :].split(".parquet:") for name in each] for each in names)
        return [np.array([int(p) * SHARD + int(row) for p, row in each]) for each in places]

    def measured() -> dict[str, Any]:
        batch = timed(lambda: index.search(asked, K), max(1, rounds // 10))
        found = rows(asked)
        return {
            "recall": codes.recall(found),
            "recall_real": codes.recall(found, codes.is_real),
            "alone": timed(lambda: index.search(next(questions), K), rounds),
            "batch": {name: value / len(asked) for name, value in batch.items()},
        }

    questions = itertools.cycle(asked[:, None])
    filters = (f"psnr < 1.{number:05d}" for number in itertools.count())  # each a new one
    with unittest.mock.patch.object(similar_index, "SKETCHED", len(index) + 1):
        scanned = measured()
    before, started = anonymous_bytes(), time.perf_counter()
    index.search(asked[: SCANNED + 1], 1)
    packed_s = time.perf_counter() - started
    grown = anonymous_bytes() - before
    return measured() | {
        "bytes": codes.bytes_per_row,
        "scanned": scanned,
        "packed_s": packed_s if len(index) >= SKETCHED else None,
        "memory": grown / len(index) if len(index) >= SKETCHED else None,
        "pass": timed(lambda: [np.add.reduce(c.view(np.uint64), None) for c in index._codes], 5),
        "filtered": timed(lambda: index.search(next(questions), K, next(filters)), rounds),
        "filtered_again": timed(lambda: index.search(next(questions), K, "psnr < 1"), rounds),
    }


def theirs(name: str, codes: Codes, folder: Path, rounds: int) -> dict[str, Any]:
    """The first setting that finds enough, timed as ours is, re-ranking included."""
    library = LIBRARIES[name]
    started = time.perf_counter()
    try:
        at = library.build(codes, folder)
    except OutOfTimeError as error:
        return {"reached": error.args[0], "build_s": time.perf_counter() - started}
    built_s = time.perf_counter() - started
    asked = codes.index.projection.project(codes.asked)
    result: dict[str, Any] = {}
    search = at(library.knob[0])
    for knob in library.knob:
        search = at(knob)
        recall = codes.recall(codes.reranked(search(asked)))
        result = {"recall": recall, "knob": knob}
        if recall >= WANTED:
            break

    def answer(first: int, stop: int) -> None:
        part = replace(codes, asked=codes.asked[first:stop])
        part.reranked(search(asked[first:stop]))

    turn = iter(np.arange(10 * rounds) % QUESTIONS)

    def one() -> None:
        at = int(next(turn))
        answer(at, at + 1)

    batch = timed(lambda: answer(0, QUESTIONS), max(1, rounds // 10), warm_up=0)
    return result | {
        "alone": timed(one, rounds),
        "batch": {key: value / QUESTIONS for key, value in batch.items()},
        "build_s": built_s,
        "bytes": library.bytes_each(codes),
    }


def cold(folder: Path, codes: Codes) -> dict[str, float]:
    """A new process whose files are not in memory: from open to the first answer."""
    for path in (*folder.glob("*.vectors"), *folder.glob("*.exact")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    np.save(folder / "question.npy", codes.asked[:1])
    program = (
        "import sys, time; from benchmarks.similar import open_parts; import numpy as np\n"
        "start, busy = time.perf_counter(), time.process_time()\n"
        "index = open_parts(sys.argv[1]); opened = time.perf_counter()\n"
        "index.search(np.load(sys.argv[1] + '/question.npy'), 10)\n"
        "print(opened - start, time.perf_counter() - start, time.process_time() - busy)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    opened, answered, busy = (1e3 * float(each) for each in done.stdout.split())
    return {"opened_ms": opened, "answered_ms": answered, "answered_cpu_ms": busy}


def store(folder: Path, codes: Codes, server: S3Server) -> dict[str, Any]:
    """Opened and asked on an S3 server: recall, seconds, requests and bytes."""
    import boto3

    place = with_ledger(folder, codes.index)
    local = replace(codes.index, tables=[t.drop_columns("code") for t in codes.index.tables])
    found = local.search(codes.asked, K)
    numbers = [np.array([_row_of(key) for key in t["sample_key"].to_pylist()]) for t in found]
    result: dict[str, Any] = {
        "recall": codes.recall(numbers),
        "recall_real": codes.recall(numbers, codes.is_real),
    }
    cache = tempfile.TemporaryDirectory()
    other = tempfile.TemporaryDirectory()
    with unittest.mock.patch.dict(os.environ, server.environment), cache, other:
        bucket = server.make_bucket()
        # A session of its own: the default one keeps the keys of the server before.
        client = boto3.Session().client("s3", endpoint_url=server.endpoint)
        for path in sorted(place.rglob("*.*")):
            name = str(path.relative_to(place))
            if name.startswith(FOLDER):
                continue  # of this disk's commits
            client.upload_file(str(path), bucket.removeprefix("s3://"), name)
        write_metadata(bucket)
        open_filesystem(bucket)[0].exists(f"{bucket}/run.json")  # a client is there
        result |= _asked(bucket, codes, cache.name)
        with s3_proxy(server.endpoint) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            os.environ["REFINERY_CACHE"] = other.name
            index = open_index(bucket)
            index.search(codes.asked[:1], K)
            requests, sent = [*proxy.paths], proxy.bytes
            proxy.forget()
            index.search(codes.asked[1:2], K)
            result |= {"requests": len(requests), "megabytes": sent / 1e6}
            result |= {"again_requests": proxy.requests.total()}
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
        result["bare_s"] = _bare_seconds(client, [r for r in requests if r.startswith("GET /")])
    return result


def store_of(folder: Path, codes: Codes, make: Callable[[], S3Server]) -> dict[str, Any]:
    """`store` on a server of its own, with the machine's load."""
    server = make()
    try:
        return store(folder, codes, server) | {"load": os.getloadavg()[0]}
    finally:
        server.stop()


def servers() -> dict[str, Callable[[], S3Server]]:
    """Those that are installed."""
    found: dict[str, Callable[[], S3Server]] = {"moto": S3Server}
    if all(map(shutil.which, ceph.PROGRAMS)):
        found["Ceph's gateway"] = lambda: ceph.CephGateway(memory_bytes=2**33)
    return found


def _row_of(key: str) -> int:
    """Of a key of `_key`."""
    shard, number = key.removeprefix("train64-").split(".parquet:")
    return int(shard) * SHARD + int(number)


def _asked(uri: str, codes: Codes, cache: str) -> dict[str, float]:
    """Seconds: of opening, of the first answer, of one more, of the first answer where an earlier
    process has kept what it fetched."""
    os.environ["REFINERY_CACHE"] = cache
    clock = [time.perf_counter()]
    busy = time.process_time()
    index = open_index(uri)
    clock.append(time.perf_counter())
    index.search(codes.asked[:1], K)
    clock.append(time.perf_counter())
    busy = time.process_time() - busy
    index.search(codes.asked[1:2], K)
    clock.append(time.perf_counter())
    while not list(Path(cache).rglob("*.arrow")):
        time.sleep(0.05)
    kept = time.perf_counter()
    open_index(uri).search(codes.asked[2:3], K)
    return {
        "opened_s": clock[1] - clock[0],
        "answered_s": clock[2] - clock[0],
        "answered_cpu_s": busy,
        "again_s": clock[3] - clock[2],
        "kept_s": time.perf_counter() - kept,
    }


def _bare_seconds(client: Any, requests: list[str]) -> float:
    """What the server takes for the same objects and ranges, asked for by plain HTTP over sixteen
    connections: the least that any client could take."""
    local = threading.local()
    signed = []
    for request in requests:
        _, path, span = request.split(" ", 2)
        if "?" in path:  # a listing
            continue
        bucket, _, key = urllib.parse.unquote(path)[1:].partition("/")
        wanted = {"Bucket": bucket, "Key": key} | ({"Range": span} if span != "None" else {})
        url = urllib.parse.urlsplit(client.generate_presigned_url("get_object", wanted))
        signed.append((url, {"Range": span} if span != "None" else {}))

    def get(request: tuple[urllib.parse.SplitResult, dict[str, str]]) -> int:
        url, headers = request
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(url.netloc)
        local.connection.request("GET", f"{url.path}?{url.query}", headers=headers)
        answer = local.connection.getresponse()
        assert answer.status in (200, 206), answer.read()
        return len(answer.read())

    with ThreadPoolExecutor(READERS) as pool:
        started = time.perf_counter()
        list(pool.map(get, signed))
        return time.perf_counter() - started


def build_rate(run: str) -> dict[str, Any]:
    """`refinery index` over at most `BUILT` rows of a run, by one worker in this process; and
    `refinery similar` on that, the whole command."""
    from pipeline.config import load_stored_config
    from pipeline.run import plan
    from pipeline.run import run as work

    with tempfile.TemporaryDirectory() as folder:
        config = load_stored_config("index", run, None, ["engine.kind=inline"])
        plan(run, f"{folder}/index", config, limit=BUILT)
        started = time.perf_counter()
        Indexer(config.job, "cpu").projection(f"{folder}/index")  # else the first shard fits it
        fitted_s = time.perf_counter() - started
        busy = time.process_time()
        outcome = work(f"{folder}/index", config.engine)
        busy = time.process_time() - busy
        markers = ledger.read_markers(f"{folder}/index").values()
        stages = {
            stage: sum(marker.seconds[stage] for marker in markers)
            for stage in ("read", "embed", "write")
        }
        (key,) = query(run, "SELECT min(sample_key) AS k FROM samples WHERE status = 'ok'")["k"]
        words = ("similar", f"{folder}/index", "--key", key.as_py(), "-k", "10")
        return {
            "command": command_seconds(Path(folder), *words),
            "rows": outcome.rows,
            "fitted_s": fitted_s,
            "per_s": outcome.rows / outcome.seconds,
            "per_cpu_s": outcome.rows / busy,
            **stages,
        }


# ---------------------------------------------------------------------------- the page


def page(found: dict[str, Any]) -> str:
    """The section of benchmarks/query.md."""
    machine = found["machine"]
    lines = [
        "## Similarity",
        "",
        f"{machine['date']}, {machine['chip']}; `python -m benchmarks.similar --run RUN`. "
        "Milliseconds a question by the clock, in brackets of processors; the load is that of the "
        "machine when the row was measured. All rows of a size are of the same codes and the same "
        f"exact ranking of {RERANKED} candidates; a library with a knob is at its first setting "
        f"with a recall of {WANTED}. Beyond a million rows vectors are coordinates along "
        f"{SPECTRUM} directions, as far apart as whole codes. A library that was not built after "
        f"{BUILD_S:.0f} s is given up; one without a row was not measured at that size. "
        "DuckDB's own index (VSS) is an extension that has to be "
        "downloaded, so its row is its scan.",
        "",
        "![milliseconds a question by rows](similar.svg)",
        "",
        "| rows | what | recall@10 | of real questions | bytes | alone | in batches of 100 | "
        "1 % filter; the same again | build, s | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows, table in _sizes(found):
        for name, each in table.items():
            lines.append(f"| {int(rows):,} | {_row(name, each)} |")
            if each.get("packed_s"):
                lines.append(f"| {int(rows):,} | {_row(SCAN, each | each['scanned'])} |")
    lines += [
        "",
        "On an object store on the same machine, nothing kept of it yet; seconds by the clock. The "
        "last column is plain HTTP, sixteen connections, asking that server for the same objects "
        "and ranges: about what the server itself takes. Wanted: a first answer in less than 1 s.",
        "",
        "| rows | server | recall@10 | of real questions | first answer (of processors) | requests "
        "| MB | one more question | requests | first answer of the next process | bare download of "
        "the first | load |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {int(rows):,} | {server} | {each['recall']:.3f} | {each['recall_real']:.3f} | "
        f"{each['answered_s']:.2f} ({each['answered_cpu_s']:.2f}) | {each['requests']} | "
        f"{each['megabytes']:.0f} | {each['again_s']:.2f} | {each['again_requests']} | "
        f"{each['kept_s']:.2f} | {each['bare_s']:.2f} | {each['load']:.0f} |"
        for rows, table in _sizes(found)
        for server, each in table["refinery"].get("store", {}).items()
    ]
    return "\n".join([*lines, "", *_goals(found)]) + "\n"


def _sizes(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(found["rows"].items(), key=lambda item: int(item[0]))


def plot(found: dict[str, Any]) -> str:
    """Milliseconds alone by rows, of everything that was measured at two sizes."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for rows, table in _sizes(found):
        own = table["refinery"]
        batch = ("refinery, in batches of 100", {"alone": own["batch"]})
        scanned = [(SCAN, own["scanned"])] if own["packed_s"] else []
        for name, each in (*table.items(), *scanned, batch):
            if "alone" in each:
                curves.setdefault(name, []).append((float(rows), each["alone"]["ms"]))
    shown = {name: curve for name, curve in curves.items() if len(curve) > 1}
    return loglog(shown, "rows", "milliseconds a question")


def _row(name: str, each: dict[str, Any]) -> str:
    if "reached" in each:
        text = f"not built: {each['reached']:,} rows after {each['build_s']:.0f} s"
        return f"{name} | {text} | | | | | | | {each['load']:.0f}"

    def cell(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['ms']:.1f} ({value['cpu_ms']:.1f})"

    is_scan = name == SCAN
    knob = "" if each.get("knob") is None else f", {each['knob']}"
    filtered = [cell(each.get(kind)) for kind in ("filtered", "filtered_again")]
    cells = [
        f"{name}{knob}",
        f"{each['recall']:.3f}",
        f"{each['recall_real']:.3f}" if "recall_real" in each else "",
        f"{each['bytes']:.0f}",
        cell(each["alone"]),
        cell(each["batch"]),
        "; ".join(filtered).strip("; ") if not is_scan else "",
        f"{each['build_s']:.1f}" if "build_s" in each else "",
        f"{each['load']:.0f}",
    ]
    return " | ".join(cells)


def _goals(found: dict[str, Any]) -> Iterator[str]:
    yield "| goal | wanted | by the clock | of processors | |"
    yield "|---|---|---|---|---|"
    own = found["rows"]["1000000"]["refinery"]
    largest = found["rows"].get("10000000", {}).get("refinery", {"alone": {}})
    build, cold = found.get("build", {}), own["cold"]
    at = f"at load {build['command']['load']:.0f}" if build else ""
    goals = [
        ("recall@10 of real questions", ">= 0.99", own["recall_real"], None),
        ("alone, ms", "<= 20", *own["alone"].values()),
        ("alone, codes scanned, ms", "", *own["scanned"]["alone"].values()),
        ("a sum over all codes by NumPy, ms", "", *own["pass"].values()),
        ("in batches of 100, ms a question", "<= 5", *own["batch"].values()),
        ("bytes a vector", "<= 300", own["bytes"], None),
        (
            f"build, vectors/s, {build.get('rows', 0):,} rows, one worker, {at}",
            ">= 20000",
            build.get("per_s"),
            build.get("per_cpu_s"),
        ),
        (
            "first answer, cold local file, ms",
            "< 150",
            cold["answered_ms"],
            cold["answered_cpu_ms"],
        ),
        (
            f"`refinery similar --key`, {build.get('rows', 0):,} rows, ms, {at}",
            "<= 700",
            1e3 * build["command"]["median"] if build else None,
            1e3 * build["command"]["cpu"] if build else None,
        ),
        ("filter that keeps 1 %, ms", "", *own["filtered"].values()),
        ("the same, of the time alone", "<= 1", own["filtered"]["ms"] / own["alone"]["ms"], None),
        (
            "the same condition again, of the time alone",
            "<= 1",
            own["filtered_again"]["ms"] / own["alone"]["ms"],
            None,
        ),
        ("packing the sketches, once a process, ms", "", 1e3 * own["packed_s"], None),
        (
            "alone at 10,000,000 rows, ms",
            "<= 60",
            largest["alone"].get("ms"),
            largest["alone"].get("cpu_ms"),
        ),
        ("recall@10 there, of real questions", ">= 0.99", largest.get("recall_real"), None),
        ("memory of the process there, bytes a row", "", largest.get("memory"), None),
    ]
    for what, goal, value, busy in goals:
        if value is None:
            yield f"| {what} | {goal} | | | not measured |"
            continue
        sign, _, limit = goal.partition(" ")
        is_met = value >= float(limit or 0) if sign == ">=" else value <= float(limit or 0)
        of_processors = "" if busy is None else f"{busy:.4g}"
        verdict = ("met" if is_met else "not met") if goal else ""
        yield f"| {what} | {goal} | {value:.4g} | {of_processors} | {verdict} |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--build-run", help="what is indexed for the rate of building; else RUN")
    parser.add_argument("--only", nargs="+", default=["refinery", *LIBRARIES, "build"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where codes are kept for the next time")
    args = parser.parse_args()
    path = HERE / "similar.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    found |= {"machine": describe_machine()}
    if "build" in args.only:
        found["build"] = build_rate(args.build_run or args.run)
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.folder or Path(temporary)) / str(rows)
            folder.mkdir(parents=True, exist_ok=True)
            codes = make_codes(real_codes(args.run), rows, folder)
            table = found["rows"].setdefault(str(rows), {})
            for name in args.only:
                if name == "refinery":
                    table[name] = ours(codes, args.rounds) | {"cold": cold(folder, codes)}
                elif name == "store":
                    for server, make in servers().items():
                        measured = store_of(folder, codes, make)
                        table["refinery"]["store"] = {
                            **table["refinery"].get("store", {}),
                            server: measured,
                        }
                        sys.stderr.write(f"{rows} {server} {measured}\n")
                        path.write_text(json.dumps(found, indent=1) + "\n")
                elif name in LIBRARIES and rows <= WIDE:
                    table[name] = theirs(name, codes, folder, args.rounds)
                if name in table:
                    table[name] |= {"load": os.getloadavg()[0]}
                sys.stderr.write(f"{rows} {name} {table.get(name)}\n")
                path.write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "similar.svg").write_text(plot(found))
    sys.stdout.write(write_section(HERE / "query.md", page(found)))


if __name__ == "__main__":
    main()

"""What a question to a run costs: locally by the clock, on an object store in requests.

Run: python -m benchmarks.query [--rows 10000 100000 1000000] [--shard 10000] [--folder DIR]

Runs of made-up rows by the real writers: faces64's W+ in float16, each layer's w moved from that of
the sample by a difference of two others, so that the codes have the generator's own spectrum. The
store is moto's server behind a proxy that counts. "From the parts" is the same question without the
metadata file and without passing columns on, as DuckDB answers it over the Parquet parts.

Writes benchmarks/query.json and the section "Questions" of benchmarks/query.md.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sections import write_section
from models.checkpoints.load import load_generator
from models.stylegan2.generator import weights_hash
from tasks.benchmark.machine import describe_machine
from tasks.catalogue.opened import open_run
from tasks.job import JobConfig, MethodConfig, OutputConfig
from tasks.run.ledger import seal, write_marker
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker
from tasks.run.metadata import FOLDER, read_snapshot, write_metadata
from tasks.run.parts import Layout, write_parts
from tasks.run.query import query
from tasks.run.rows import Row
from tasks.run.run_json import Declared, RunHandle, create_run, utc_now
from tasks.run.views import Session
from tests.s3_proxy import s3_proxy
from tests.s3_server import S3Server

HERE = Path(__file__).parent
METRICS = ("mse", "psnr", "ssim", "trunk_distance", "identity", "nscd")
FAILED = 0.01
ROUNDS = 7
SPREAD = 0.35
KEY = "SELECT sample_key, psnr, w_plus FROM latents WHERE sample_key = $key"
MEAN = "SELECT error_kind, count(*) AS n, avg(psnr) FROM samples WHERE identity > 0.6 GROUP BY ALL"
TOP = "SELECT sample_key, w_plus FROM latents WHERE status = 'ok' ORDER BY psnr DESC LIMIT 20"
QUESTIONS = {"key with its code": KEY, "filter and aggregate": MEAN, "top 20 with codes": TOP}


def make_run(uri: str, rows: int, shard_rows: int) -> None:
    """A sealed run of so many rows, and its metadata file."""
    job = JobConfig(
        generator="faces64",
        methods=(MethodConfig(name="e4e"),),
        output=OutputConfig(pictures=(), latents="float16"),
    )
    generator = load_generator("faces64")
    with torch.inference_mode():
        z = torch.randn(2**15, generator.z_dim, generator=torch.Generator().manual_seed(0))
        w = generator.mapping(z)[:, 0].numpy()
    shape = (generator.num_ws, generator.w_dim)
    layout = Layout(method="e4e", metrics=METRICS, shape=shape, output=job.output)
    declared = Declared(
        kind="invert",
        stages=("read", "decode", "invert", "score", "write"),
        stores_doors=True,
        method="e4e",
        metrics=METRICS,
        pictures=(),
    )
    shards = -(-rows // shard_rows)
    info = ManifestInfo(num_shards=shards, num_samples=rows, num_bytes=0, sha256="0" * 64)
    run = create_run(uri, job, info, {"generator": weights_hash(generator)}, "benchmark", declared)
    draw = np.random.default_rng(0)
    for shard in range(shards):
        first = shard * shard_rows
        write_shard(run, layout, shard, range(first, min(first + shard_rows, rows)), w, draw)
    seal(uri)
    write_metadata(uri)


def write_shard(
    run: RunHandle,
    layout: Layout,
    shard: int,
    numbers: range,
    w: np.ndarray,
    draw: np.random.Generator,
) -> None:
    """One committed shard."""
    layers, count = layout.shape[0], len(numbers)
    own, one, other = (draw.integers(0, len(w), (count, n)) for n in (1, layers, layers))
    codes = w[own] + SPREAD * (w[one] - w[other])
    scores = draw.normal(0.6, 0.15, (count, len(METRICS))).astype(np.float32)
    rows = []
    for at, number in enumerate(numbers):
        row = Row(
            sample_key=f"photos/{number // 1000:05d}/{number:08d}.jpg",
            image_uri=f"s3://bucket/photos/{number // 1000:05d}/{number:08d}.jpg",
            image_sha256=draw.bytes(32).hex(),
            seed=int(draw.integers(2**62)),
        )
        if draw.random() < FAILED:
            row.fail("decode", "not a picture that can be read")
        else:
            row.w_plus = codes[at]
            row.metrics = dict(zip(METRICS, scores[at].tolist(), strict=True))
        rows.append(row)
    parts = write_parts(rows, layout, run, shard, f"{shard:012x}")
    failed = sum(row.error_kind is not None for row in rows)
    now = utc_now()
    marker = Marker(
        shard=shard,
        attempt=f"{shard:012x}",
        run_id=run.run_id,
        rows=count,
        failed=failed,
        parts=parts,
        seconds={"invert": 1.0},
        wall_s=1.0,
        failures={"decode": failed},
        device="cpu",
        code_version="benchmark",
        started_at=now,
        finished_at=now,
    )
    write_marker(run.uri, marker)


# ---------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Least and median time of a few rounds after one that warms up, and the processor's."""
    work()
    clock, cpu = [], []
    for _ in range(rounds):
        started, used = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {"median": statistics.median(clock), "least": min(clock), "cpu": min(cpu)}


def command_seconds(folder: Path, *words: str) -> dict[str, float]:
    """A whole command, a new process each time, with byte code kept as by an installed one."""
    tokens = [sys.executable, "-m", "pipeline.cli", *words]
    kept = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "byte-code")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)

    def run() -> None:
        subprocess.run(tokens, check=True, stdout=subprocess.DEVNULL, env=kept)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = seconds(run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**found, "cpu": used / (ROUNDS + 1), "load": os.getloadavg()[0]}


def measure_local(uri: str, rows: int) -> dict[str, Any]:
    """Seconds of each question, from the metadata file and from the parts alone."""
    key = f"photos/{rows // 2 // 1000:05d}/{rows // 2:08d}.jpg"
    while not query(uri, KEY, {"key": key})["psnr"][0].is_valid:  # a failed row has no code
        key = query(
            uri, "SELECT max(sample_key) AS k FROM samples WHERE sample_key < $key", {"key": key}
        )["k"][0].as_py()
    opened = open_run(uri)
    found: dict[str, Any] = {"open_run(...).code(key)": seconds(lambda: opened.code(key))}
    for name, sql in QUESTIONS.items():
        parameters = {"key": key} if "$key" in sql else {}
        found[name] = seconds(partial(query, uri, sql, parameters))
    found["the command"] = command_seconds(Path(uri).parent, "query", uri, MEAN)
    return {"key": key, "seconds": found, "from the parts": measure_parts(uri, key)}


def measure_parts(uri: str, key: str) -> dict[str, dict[str, float]]:
    """The same questions without what this page is about."""
    held = Path(uri, FOLDER)
    held.rename(f"{uri}.{FOLDER}")
    cache = os.environ.pop("REFINERY_CACHE", None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["REFINERY_CACHE"] = folder
            return {
                name: seconds(partial(_ask_parts, uri, sql, key), 3)
                for name, sql in QUESTIONS.items()
            }
    finally:
        os.environ.pop("REFINERY_CACHE")
        if cache is not None:
            os.environ["REFINERY_CACHE"] = cache
        Path(f"{uri}.{FOLDER}").rename(held)


def _ask_parts(uri: str, sql: str, key: str) -> None:
    session = Session({"run": read_snapshot(uri)})
    session._used = lambda sql: {"latents"}  # as for a question that computes with codes
    given = {"key": key} if "$key" in sql else {}
    session.ask(sql.replace("samples", "latents"), given)
    session.close()


def measure_store(uri: str, key: str) -> dict[str, Any]:
    """Requests, bytes and seconds of each question on an S3 server."""
    import boto3

    server = S3Server()
    before = dict(os.environ)
    try:
        os.environ.update(server.environment)
        bucket = server.make_bucket()
        client = boto3.client("s3", endpoint_url=server.endpoint)
        for path in sorted(Path(uri).rglob("*")):
            if path.is_file():
                name = path.relative_to(uri).as_posix()
                client.upload_file(str(path), bucket.removeprefix("s3://"), f"run/{name}")
        with s3_proxy(server.endpoint) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
            # The copies have other etags: the file is written anew, as sealing does.
            write_metadata(f"{bucket}/run")
            found = {}
            for name, sql in QUESTIONS.items():
                given = {"key": key} if "$key" in sql else {}
                query(f"{bucket}/run", sql, given)
                proxy.forget()
                started = time.perf_counter()
                query(f"{bucket}/run", sql, given)
                found[name] = {
                    "seconds": time.perf_counter() - started,
                    "requests": proxy.requests.total(),
                    "megabytes": proxy.bytes / 1e6,
                }
            return found
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)


def measure(folder: Path, rows: int, shard_rows: int, *, with_store: bool) -> dict[str, Any]:
    """All figures of one size."""
    uri = str(folder / f"run-{rows}-{shard_rows}")
    if not Path(uri, "_SEALED.json").exists():
        make_run(uri, rows, shard_rows)
    (file,) = Path(uri, FOLDER).iterdir()
    size = file.stat().st_size
    found = measure_local(uri, rows)
    Path(uri, FOLDER).rename(f"{uri}.old")
    started = time.perf_counter()
    write_metadata(uri)
    written_s = time.perf_counter() - started
    shutil.rmtree(f"{uri}.old")
    return {
        "rows": rows,
        "shards": -(-rows // shard_rows),
        "metadata_bytes": size,
        "metadata_s": written_s,
        **found,
        "store": measure_store(uri, found["key"]) if with_store else {},
        "load": os.getloadavg()[0],
    }


# ---------------------------------------------------------------------------- the page


def page(found: dict[str, Any]) -> str:
    """The section of benchmarks/query.md."""
    machine = found["machine"]
    lines = [
        "## Questions",
        "",
        f"{machine['date']}, {machine['chip']}; `python -m benchmarks.query`. Milliseconds by the "
        "clock, median of seven rounds (least; of processors), caches warm. Where the machine was "
        "busy (its load stands in the table) the time of processors and the ratios tell more.",
        "",
        "| rows | shards | question | local | from the parts alone | S3: requests | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in found["sizes"].values():
        head = f"| {size['rows']:,} | {size['shards']:,} "
        for name, times in size["seconds"].items():
            store, parts = size["store"].get(name), size["from the parts"].get(name)
            sent = f"{store['requests']} | {store['megabytes']:.1f}" if store else " | "
            lines.append(
                f"{head}| {name} | {_ms(times)} | {_ms(parts) if parts else ''} | {sent} |"
            )
    lines += ["", "| rows | shards | metadata file | bytes a row | written in, s | load |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {s['rows']:,} | {s['shards']:,} | {s['metadata_bytes'] / 1e6:.1f} MB | "
        f"{s['metadata_bytes'] / s['rows']:.0f} | {s['metadata_s']:.1f} | {s['load']:.0f} |"
        for s in found["sizes"].values()
    ]
    return (
        "\n".join([*lines, *_goals(max(found["sizes"].values(), key=lambda s: s["rows"]))]) + "\n"
    )


def _goals(size: dict[str, Any]) -> list[str]:
    """What was wanted of the largest run, beside what was measured on it."""
    times, store = size["seconds"], size["store"]
    wanted = (
        ("key with its code, opened in Python, local", "< 50 ms", times["open_run(...).code(key)"]),
        ("filter and aggregate, local", "< 300 ms", times["filter and aggregate"]),
        ("the command itself", "< 700 ms", times["the command"]),
    )
    lines = ["", f"| goal at {size['rows']:,} rows | wanted | ms: clock (least; processors) |"]
    lines += ["|---|---|---|", *(f"| {name} | {goal} | {_ms(t)} |" for name, goal, t in wanted)]
    lines += [
        f"| {name}, requests on S3 | <= {most} | {store[name]['requests']} |"
        for name, most in (("key with its code", 12), ("filter and aggregate", 15))
        if store
    ]
    return lines


def _ms(times: dict[str, float]) -> str:
    median, least, cpu = (f"{1000 * times[name]:.0f}" for name in ("median", "least", "cpu"))
    load = f" at load {times['load']:.0f}" if "load" in times else ""
    return f"{median} ({least}; {cpu}){load}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard", type=int, default=10_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-store", action="store_true")
    parser.add_argument("--command", action="store_true", help="only the command, of kept runs")
    args = parser.parse_args()
    path = HERE / "query.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        os.environ["REFINERY_CACHE"] = str(Path(temporary, "cache"))
        for rows in args.rows:
            name = f"{rows}/{args.shard}"
            if args.command:
                uri = str(folder / f"run-{rows}-{args.shard}")
                times = command_seconds(folder, "query", uri, MEAN)
                found["sizes"][name]["seconds"]["the command"] = times
            else:
                figures = measure(folder, rows, args.shard, with_store=not args.no_store)
                found["sizes"][name] = figures
            found["machine"] = describe_machine()
            path.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(write_section(HERE / "query.md", page(found)))


if __name__ == "__main__":
    main()

"""`refinery browse` in a browser: slider steps at 64 px, pages of a run of 100,000 rows.

    python -m benchmarks.browse --rows 100000

A run is written by the real writers (faces of the bundled generator, a few hundred different ones,
codes and metrics of every row its own), served by `refinery browse`, and looked at by a headless
Chromium, whose own clock is read.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoints.load import load_generator
from models.pictures import to_bytes
from models.stylegan2.generator import Generator, weights_hash
from tasks.browse.address import link
from tasks.job import JobConfig, MethodConfig
from tasks.run import ledger, run_json
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker
from tasks.run.metadata import write_metadata
from tasks.run.parts import Layout, write_parts
from tasks.run.rows import Row, encode_picture

SHARD, FACES = 256, 256
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
METRICS = ("mse", "psnr", "ssim", "trunk_distance", "nscd")


@torch.inference_mode()
def draw(generator: Generator) -> tuple[np.ndarray, list[bytes]]:
    """w+ and encoded pictures of a few hundred faces."""
    z = torch.randn(FACES, generator.z_dim, generator=torch.Generator().manual_seed(0))
    w_plus = generator.mapping(z, truncation_psi=0.8)
    images = torch.cat([generator.synthesis(part) for part in w_plus.split(32)])
    return w_plus.numpy(), [encode_picture(p, "png") for p in to_bytes(images).numpy()]


def rows_of(shard: int, count: int, w_plus: np.ndarray, pictures: list[bytes]) -> Iterator[Row]:
    rng = np.random.default_rng(shard)
    for at in range(shard * SHARD, shard * SHARD + count):
        key = f"album-{at // 1000:03d}/{at:07d}.png"
        row = Row(sample_key=key, image_uri=key, image_sha256="00" * 32, seed=at)
        if at % 100 == 99:
            row.fail("decode", "damaged picture: image file is truncated")
        else:
            face = int(rng.integers(FACES))
            row.w_plus = w_plus[face] + rng.normal(0, 0.05, w_plus[face].shape).astype(np.float32)
            values = np.abs(rng.normal((0.02, 22, 0.8, 0.2, 1.0), (0.01, 3, 0.05, 0.05, 0.2)))
            row.metrics = dict(zip(METRICS, map(float, values), strict=True))
            row.pictures = {
                "input": pictures[int(rng.integers(FACES))],
                "inversion": pictures[face],
            }
        yield row


def write_run(folder: Path, rows: int) -> str:
    """A sealed run of so many rows; one that is there is taken as it is."""
    uri = str(folder / f"rows-{rows}")
    if Path(uri, "_SEALED.json").exists():
        return uri
    generator = load_generator("faces64")
    w_plus, pictures = draw(generator)
    job = JobConfig(generator="faces64", methods=(MethodConfig(name="e4e"),))
    layout = Layout(method="e4e", metrics=METRICS, shape=w_plus.shape[1:], output=job.output)
    declared = run_json.Declared(
        kind="invert",
        stages=("read", "decode", "invert", "score", "write"),
        stores_doors=True,
        method="e4e",
        metrics=METRICS,
        pictures=("input", "inversion"),
    )
    shards = -(-rows // SHARD)
    hashes = {"generator": weights_hash(generator)}
    manifest = ManifestInfo(shards, rows, rows * 4096, "00" * 32)
    run = run_json.create_run(uri, job, manifest, hashes, "benchmark", declared)
    for shard in range(shards):
        made = list(rows_of(shard, min(SHARD, rows - shard * SHARD), w_plus, pictures))
        failed = sum(row.error_kind is not None for row in made)
        marker = Marker(
            shard=shard,
            attempt="a",
            run_id=run.run_id,
            rows=len(made),
            failed=failed,
            parts=write_parts(made, layout, run, shard, "a"),
            seconds={"invert": 10.0},
            wall_s=11.0,
            failures={"decode": failed} if failed else {},
            device="cpu",
            code_version="benchmark",
            started_at=f"2026-11-20T{shard // 60 % 24:02d}:{shard % 60:02d}:00.000+00:00",
            finished_at=f"2026-11-20T{shard // 60 % 24:02d}:{shard % 60:02d}:50.000+00:00",
        )
        ledger.write_marker(uri, marker)
    write_metadata(uri)
    ledger.seal(uri)
    return uri


# ------------------------------------------------------------------ looking


@contextmanager
def served(place: str) -> Iterator[str]:
    """The address of `refinery browse`, as a program of its own."""
    command = [sys.executable, "-m", "pipeline.cli", "browse", place, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().rsplit(" ", 1)[1].strip()
        process.terminate()


def pages_of(run: str) -> dict[str, str]:
    """Grids whose rows lie together, and grids whose rows lie all over the run."""
    grid = partial(link, "/grid", run=run)
    deep = {"value": "album-050/0050000.png", "key": "album-050/0050000.png", "at": 50_000}
    condition = "trunk_distance > 0.2 AND sample_key LIKE '%7.png'"
    return {
        "first page": grid(),
        "in the middle, by name": grid(**deep),
        "worst PSNR of all": grid(sort="psnr", status="ok"),
        "range and condition in SQL": grid(**{"max.psnr": 20}, where=condition, sort="nscd"),
        "text search": grid(q="0077"),
    }


def load_ms(page: Any, address: str) -> tuple[float, float]:
    """Milliseconds until the page stands, and until its pictures do, as the browser counts."""
    page.goto(address, wait_until="load")
    timing = page.evaluate(
        "(() => { const t = performance.getEntriesByType('navigation')[0];"
        " return [t.domContentLoadedEventEnd, t.loadEventEnd]; })()"
    )
    return timing[0], timing[1]


def steps_ms(page: Any, address: str, count: int) -> list[float]:
    """Milliseconds of slider steps, from the input event to the picture on the page."""
    page.goto(address, wait_until="load")
    sliders = ("direction.age", "domain.impasto")
    for at in range(count + 5):
        value = f"{(at % 13 + 1) / 10:g}"
        page.locator(f"input[name='{sliders[at % 2]}']").fill(value)
        page.wait_for_selector(f"#live[data-steps='{at + 1}']")
    found = page.evaluate("performance.getEntriesByName('step').map(step => step.duration)")
    return found[5:]  # the first ones compile


def measure(run_uri: str, rounds: int) -> list[tuple[str, list[float]]]:
    """Milliseconds by what was measured."""
    from playwright.sync_api import sync_playwright

    name = run_uri.rsplit("/", 1)[-1]
    found: dict[str, list[float]] = {}
    with served(run_uri) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(300_000)
        page.goto(address)  # the run is opened once
        for what, path in pages_of(name).items():
            for _ in range(rounds):
                stands, whole = load_ms(page, address.rstrip("/") + path)
                found.setdefault(what, []).append(stands)
                found.setdefault(f"{what}, pictures too", []).append(whole)
        picture = link("/picture", run=name, key="album-000/0000000.png")
        found["slider step"] = steps_ms(page, address.rstrip("/") + picture, 40)
        browser.close()
    return list(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-browse"))
    given = parser.parse_args()
    run_uri = write_run(given.folder, given.rows)
    load = os.getloadavg()[0]
    say = sys.stdout.write
    say(f"{given.rows:,} rows; load of the machine {load:.1f} on {os.cpu_count()} cores\n\n")
    say("| what | median, ms | worst, ms |\n|---|---|---|\n")
    for what, values in measure(run_uri, given.rounds):
        say(f"| {what} | {np.median(values):.0f} | {max(values):.0f} |\n")


if __name__ == "__main__":
    main()

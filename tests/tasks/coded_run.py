"""A finished run whose codes are chosen, not found: similarity and exports have known answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator, weights_hash
from tasks.job import JobConfig, MethodConfig, OutputConfig
from tasks.run.ledger import seal, write_marker
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker
from tasks.run.parts import Layout, write_parts
from tasks.run.rows import Row
from tasks.run.run_json import Declared, create_run

METRICS = ("psnr", "nscd")


def write_coded_run(
    run_uri: str,
    generator: Generator,
    folder: Path,
    shards: Sequence[Mapping[str, np.ndarray | None]],
    latents: str = "float32",
) -> str:
    """A sealed run of inversions.

    Args:
        folder: for the generator's file.
        shards: codes [L D] by key; None is a sample that failed. `psnr` counts the samples.
    """
    path = save_generator(generator, folder / "coded.safetensors", {"terms": "test"})
    output = OutputConfig(pictures=(), latents=latents)  # type: ignore[arg-type]
    job = JobConfig(generator=str(path), methods=(MethodConfig(name="wplus"),), output=output)
    declared = Declared(
        kind="invert",
        stages=("read", "write"),
        stores_doors=True,
        method="wplus",
        metrics=METRICS,
        pictures=(),
    )
    total = sum(map(len, shards))
    info = ManifestInfo(num_shards=len(shards), num_samples=total, num_bytes=1, sha256="m" * 64)
    hashes = {"generator": weights_hash(generator)}
    run = create_run(run_uri, job, info, hashes, "1", declared)
    shape = generator.num_ws, generator.w_dim
    layout = Layout(method="wplus", metrics=METRICS, shape=shape, output=output)
    count = 0
    for number, codes in enumerate(shards):
        rows = []
        for key, code in codes.items():
            row = Row(sample_key=key, image_uri=f"in/{key}", image_sha256=None, seed=0)
            if code is None:
                row.fail("decode", "no picture")
            else:
                row.w_plus = code.astype(np.float32)
                row.metrics = {"psnr": float(count), "nscd": 0.5}
            rows.append(row)
            count += 1
        parts = write_parts(rows, layout, run, number, "a" * 12)
        failed = sum(code is None for code in codes.values())
        marker = Marker(
            shard=number,
            attempt="a" * 12,
            run_id=run.run_id,
            rows=len(rows),
            failed=failed,
            parts=parts,
            seconds={"read": 0.0, "write": 0.0},
            wall_s=0.0,
            failures={"decode": failed} if failed else {},
        )
        write_marker(run_uri, marker)
    seal(run_uri)
    return run_uri

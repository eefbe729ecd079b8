"""Reading a run back: what was stored renders the stored pictures again."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.checkpoints.native import save_generator
from models.errors import AssetError, LedgerError
from models.pictures import to_bytes
from models.stylegan2.generator import Generator
from tasks.job import MethodConfig, OutputConfig
from tasks.run.ledger import read_marker
from tasks.run.stored import read_inversions
from tasks.work.device import fixed_threads
from tasks.work.invert import Inverter
from tests.conftest import make_tiny_generator
from tests.tasks.small_run import SmallRun, begin, make_job, write_pictures

WPLUS = MethodConfig(name="wplus", settings={"steps": 1, "perceptual": "none"})
NOISE = MethodConfig(
    name="wplus", settings={"steps": 1, "perceptual": "none", "optimise_noise": True}
)
PTI = MethodConfig(name="pti", settings={"steps": 2, "perceptual": "none", "learning_rate": 0.01})
MakeRun = Callable[..., SmallRun]
CHAINS = {"codes": (WPLUS,), "noise": (NOISE,), "tuned": (WPLUS, PTI), "both": (NOISE, PTI)}


@pytest.fixture
def make_run(tiny_generator: Generator, tmp_path: Path, face_bytes: list[bytes]) -> MakeRun:
    """Five pictures and a broken file in two shards."""

    def make(chain: str = "codes", **output: Any) -> SmallRun:
        output_config = OutputConfig(**output)
        job = make_job(tiny_generator, tmp_path, methods=CHAINS[chain], output=output_config)
        pictures = write_pictures(tmp_path / "in", face_bytes[:5])
        return begin(str(tmp_path / "out"), str(pictures), job, Inverter(job, "cpu"), 4).finish()

    return make


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


def stored_pictures(run: SmallRun, name: str) -> dict[str, np.ndarray]:
    found = {}
    for shard in (0, 1):
        marker = read_marker(run.uri, shard)
        assert marker is not None
        for row in pq.read_table(f"{run.uri}/{marker.parts['images'].path}").to_pylist():
            found[row["sample_key"]] = pixels(row[name]["bytes"])
    return found


@pytest.mark.parametrize("chain", sorted(CHAINS))
def test_a_render_of_what_is_stored_is_the_stored_picture(
    make_run: MakeRun, tiny_generator: Generator, chain: str
) -> None:
    run = make_run(chain)
    want = stored_pictures(run, "inversion")
    found = {}
    for batch in read_inversions(run.uri, tiny_generator, batch=3):
        assert (batch.inversion.weights is not None) == (chain in ("tuned", "both"))
        assert (batch.inversion.noise is not None) == (chain in ("noise", "both"))
        with fixed_threads(run.inverter.threads):  # another number rounds differently
            image = to_bytes(batch.inversion.render(tiny_generator)).numpy()
        found |= dict(zip(batch.sample_keys, image, strict=True))
    assert found.keys() == want.keys()
    assert len(found) == 5
    for key, picture in want.items():
        np.testing.assert_array_equal(found[key], picture)


def test_tuned_weights_take_a_byte_each(make_run: MakeRun, tiny_generator: Generator) -> None:
    """int8 codes as they are, half-precision steps, shapes of the parameters."""
    run = make_run("tuned")
    marker = read_marker(run.uri, 0)
    assert marker is not None
    schema = pq.read_schema(f"{run.uri}/{marker.parts['residuals'].path}")
    own = dict(tiny_generator.named_parameters())
    codes = [f for f in schema if f.name.endswith("_codes")]
    for field in codes:
        name = field.name.removeprefix("weights_").removesuffix("_codes")
        assert str(field.type.value_type) == "int8"
        assert field.type.list_size == own[name].numel()
        step = schema.field(f"weights_{name}_step")
        assert str(step.type.value_type) == "halffloat"
        assert step.type.list_size <= max(own[name].shape)
    assert not any("style." in field.name for field in codes)
    group = pq.ParquetFile(f"{run.uri}/{marker.parts['residuals'].path}").metadata.row_group(0)
    for chunk in (group.column(i) for i in range(group.num_columns)):
        # Parquet has no 8-bit integers: a dictionary keeps codes at a byte or less.
        has_dictionary = "RLE_DICTIONARY" in chunk.encodings
        assert has_dictionary == ("_codes." in chunk.path_in_schema), chunk.path_in_schema
    assert len(codes) == sum(not name.startswith("style.") for name in own)


def test_batches_and_inputs(make_run: MakeRun, tiny_generator: Generator) -> None:
    run = make_run()
    batches = list(read_inversions(run.uri, tiny_generator, batch=3, with_inputs=True))
    assert [len(batch.inversion) for batch in batches] == [3, 1, 1]
    want = stored_pictures(run, "input")
    for batch in batches:
        assert batch.inversion.w_plus.dtype == torch.float32
        for key, data in zip(batch.sample_keys, batch.inputs or (), strict=True):
            np.testing.assert_array_equal(pixels(data), want[key])
    assert next(read_inversions(run.uri, tiny_generator)).inputs is None


@pytest.mark.parametrize("latents", ["float16", "float32"])
def test_codes_are_those_of_the_parquet_decoder(
    make_run: MakeRun, tiny_generator: Generator, latents: str
) -> None:
    run = make_run(latents=latents)
    found = {}
    for batch in read_inversions(run.uri, tiny_generator, batch=2):
        codes = batch.inversion.w_plus.flatten(1).numpy()
        found |= dict(zip(batch.sample_keys, codes, strict=True))
    want = {}
    for part in sorted(Path(run.uri, "latents").glob("*")):
        for row in pq.read_table(part).to_pylist():
            if row["status"] == "ok":
                want[row["sample_key"]] = np.array(row["w_plus"], np.float32)
    assert list(found) == list(want)
    assert len(found) == 5
    for key, code in want.items():
        np.testing.assert_array_equal(found[key], code)


def test_only_committed_shards_are_read(make_run: MakeRun, tiny_generator: Generator) -> None:
    run = make_run()
    (Path(run.uri) / "commits" / "00000.json").unlink()
    keys = [key for b in read_inversions(run.uri, tiny_generator) for key in b.sample_keys]
    assert keys == ["face-4.png"]


def test_another_generator_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    own, other = run.inverter.hashes["generator"], make_tiny_generator(seed=1)
    path = save_generator(other, tmp_path / "other.safetensors", {"terms": "test"})
    digest = Inverter(make_job(other, path.parent), "cpu").hashes["generator"]
    with pytest.raises(AssetError, match=rf"made with generator {own}, the one given is {digest}"):
        read_inversions(run.uri, other)


def test_inputs_that_were_not_stored(make_run: MakeRun, tiny_generator: Generator) -> None:
    run = make_run(pictures=("inversion",))
    with pytest.raises(LedgerError, match="has no input pictures"):
        read_inversions(run.uri, tiny_generator, with_inputs=True)
    assert len(list(read_inversions(run.uri, tiny_generator))) == 2


def test_parts_that_do_not_belong_together(make_run: MakeRun, tiny_generator: Generator) -> None:
    run = make_run("noise")
    marker = read_marker(run.uri, 0)
    assert marker is not None
    path = Path(run.uri) / marker.parts["residuals"].path
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    commit = Path(run.uri) / "commits" / "00000.json"
    size = marker.parts["residuals"].bytes
    commit.write_text(commit.read_text().replace(str(size), str(path.stat().st_size)))
    with pytest.raises(LedgerError, match="shard 00000 hold different samples"):
        list(read_inversions(run.uri, tiny_generator))


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_damaged_part_is_named(make_run: MakeRun, tiny_generator: Generator, damage: str) -> None:
    run = make_run()
    marker = read_marker(run.uri, 1)
    assert marker is not None
    path = Path(run.uri) / marker.parts["latents"].path
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LedgerError, match=r"latents/00001-.*\.parquet"):
        list(read_inversions(run.uri, tiny_generator))

"""Rows, pictures and bytes of edit runs."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.adaptation.domain import load_domain
from models.editing.direction import load_direction
from models.errors import AssetError, ConfigError, LedgerError, ShardError
from models.inversion.base import Inversion
from models.inversion.clcae import Clcae
from models.pictures import to_bytes
from models.stylegan2.generator import Generator
from tasks.edit_job import BlendConfig
from tasks.job import MethodConfig, OutputConfig
from tasks.run.ledger import read_markers, seal
from tasks.run.query import query
from tasks.run.source import plan_source, source_marker
from tasks.run.stored import read_inversions
from tasks.verify.run import verify
from tasks.work.device import fixed_threads
from tasks.work.edit import Editor
from tasks.work.kinds import load_job
from tests.conftest import make_tiny_generator
from tests.models.tiny_networks import save_network
from tests.tasks.small_edit import (
    make_edit_job,
    make_source,
    run_edits,
    variant,
    write_direction,
    write_domain,
)
from tests.tasks.small_run import part_bytes


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make_tiny_generator()


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, generator: Generator, face_bytes: list[bytes]
) -> dict[str, str]:
    """A run, a direction and a domain."""
    folder = tmp_path_factory.mktemp("edits")
    return {
        "source": make_source(generator, folder, face_bytes),
        "turn": write_direction(generator, folder / "turn.json"),
        "style": write_domain(generator, folder / "style"),
    }


def pictures(run_uri: str) -> dict[str, dict[str, np.ndarray]]:
    """Decoded pictures by column and key."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for marker in read_markers(run_uri).values():
        if "images" not in marker.parts:
            continue
        for row in pq.read_table(f"{run_uri}/{marker.parts['images'].path}").to_pylist():
            key = row.pop("sample_key")
            for name, picture in row.items():
                with Image.open(io.BytesIO(picture["bytes"])) as image:
                    found.setdefault(name, {})[key] = np.asarray(image)
    return found


def stored(run_uri: str, generator: Generator) -> tuple[list[str], Inversion]:
    batches = list(read_inversions(run_uri, generator, batch=3))
    keys = [key for batch in batches for key in batch.sample_keys]
    return keys, Inversion.cat([batch.inversion for batch in batches])


def test_progress_comes_batch_by_batch(place: dict[str, str], tmp_path: Path) -> None:
    """The engine takes a shard whose rows do not move for one that hangs."""
    job = make_edit_job(place["source"], variant("turned", {place["turn"]: 1.0}), batch=1)
    told: list[int] = []
    markers = run_edits(str(tmp_path / "edits"), job, on_rows=told.append)
    assert [marker.rows for marker in markers] == [4, 2]
    assert told == [1, 2, 3, 4, 1]  # the last row is broken, as it was in the source


def test_every_stored_sample_is_edited(
    place: dict[str, str], generator: Generator, tmp_path: Path
) -> None:
    job = make_edit_job(
        place["source"],
        variant("older", {place["turn"]: 2.0}),
        variant("painted", domains={place["style"]: 0.7}),
        variant("both", {place["turn"]: 2.0}, {place["style"]: 0.7}),
    )
    markers = run_edits(str(tmp_path / "out"), job)
    assert [(m.rows, m.failed, m.failures) for m in markers] == [(4, 0, {}), (2, 1, {"decode": 1})]
    assert set(markers[0].seconds) == {"read", "edit", "score", "write"}

    # A slow twin: one sample at a time, the direction and the domain's kernels written out.
    direction, domain = load_direction(place["turn"]), load_domain(place["style"])
    keys, inversions = stored(place["source"], generator)
    found = pictures(str(tmp_path / "out"))
    assert set(found) == {"input", "inversion", "older", "painted", "both"}
    for at, key in enumerate(keys):
        one = inversions[at : at + 1]
        moved = one.w_plus + 2.0 * 0.5 * direction.vector
        residual = {
            layer: type(part)(u=0.7 * part.u, v=part.v)
            for layer, part in (domain.residual or {}).items()
        }
        for name, codes, added in (
            ("inversion", one.w_plus, None),
            ("older", moved, None),
            ("painted", one.w_plus, residual),
            ("both", moved, residual),
        ):
            image = generator.synthesis(codes, list(one.noise or ()) or "const", None, added)
            want = to_bytes(image)[0].numpy().astype(int)
            assert np.abs(found[name][key].astype(int) - want).max() <= 1, (name, key)
    assert not np.array_equal(found["older"][keys[0]], found["both"][keys[0]])


def test_source_and_edits_agree_where_nothing_was_edited(
    place: dict[str, str], tmp_path: Path
) -> None:
    job = make_edit_job(
        place["source"],
        variant("same", {place["turn"]: 0.0}, {place["style"]: 0.0}),
        variant("itself", blends=(BlendConfig(sample_key="face-0.png", share=0.0),)),
    )
    run_edits(str(tmp_path / "out"), job)
    before, after = pictures(place["source"]), pictures(str(tmp_path / "out"))
    for name, twin in (("input", "input"), ("inversion", "inversion"), ("same", "inversion")):
        for key, picture in before[twin].items():
            np.testing.assert_array_equal(after[name][key], picture)
    for key, picture in after["itself"].items():
        np.testing.assert_array_equal(picture, before["inversion"][key])
    codes = "SELECT sample_key, image_sha256, seed, error, w_plus FROM latents ORDER BY 1"
    assert query(str(tmp_path / "out"), codes).equals(query(place["source"], codes))


def test_blends_take_codes_of_another_sample(
    place: dict[str, str], generator: Generator, tmp_path: Path
) -> None:
    job = make_edit_job(
        place["source"],
        variant("swap", blends=(BlendConfig(sample_key="face-1.png", share=1.0),)),
        variant("mix", blends=(BlendConfig(sample_key="face-1.png", share=0.25, rows=(2, 3)),)),
    )
    run_edits(str(tmp_path / "out"), job)
    keys, inversions = stored(place["source"], generator)
    other = inversions.w_plus[keys.index("face-1.png")]
    found = pictures(str(tmp_path / "out"))
    for at, key in enumerate(keys):
        one = inversions[at : at + 1]
        mixed = one.w_plus.clone()
        mixed[:, 2:4] += 0.25 * (other[2:4] - mixed[:, 2:4])
        for name, codes in (("swap", other[None]), ("mix", mixed)):
            want = to_bytes(generator.synthesis(codes, list(one.noise or ()) or "const"))[0].numpy()
            assert np.abs(found[name][key].astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize("method", ["refine_opt", "clcae"])
def test_own_residual_or_map_follows_its_strength(
    method: str, generator: Generator, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    chain = (
        MethodConfig(name="wplus", settings={"steps": 1, "perceptual": "none"}),
        MethodConfig(name="refine_opt", settings={"steps": 3, "perceptual": "none"}),
    )
    if method == "clcae":
        path = tmp_path / "clcae.safetensors"
        save_network(path, generator, lambda: Clcae.tiny_network(generator))
        chain = (MethodConfig(name="clcae", settings={"checkpoint": str(path)}),)
    source = make_source(generator, tmp_path, face_bytes, methods=chain)
    job = make_edit_job(source, variant("without", residual=0.0), variant("with"))
    run_edits(str(tmp_path / "out"), job)
    found = pictures(str(tmp_path / "out"))
    keys, inversions = stored(source, generator)
    assert inversions.features if method == "clcae" else inversions.residual
    for at, key in enumerate(keys):
        np.testing.assert_array_equal(found["with"][key], found["inversion"][key])
        one = inversions[at : at + 1]
        plain = to_bytes(generator.synthesis(one.w_plus, list(one.noise or ()) or "const"))[0]
        assert np.abs(found["without"][key].astype(int) - plain.numpy().astype(int)).max() <= 1
        assert not np.array_equal(found["without"][key], found["with"][key])


def test_same_bytes_again_and_with_other_batches_of_work(
    place: dict[str, str], tmp_path: Path
) -> None:
    job = make_edit_job(place["source"], variant("older", {place["turn"]: 2.0}))
    for name in ("one", "two"):
        run_edits(str(tmp_path / name), job)
        seal(str(tmp_path / name))
        assert verify(str(tmp_path / name)).problems == []
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "two")


def test_scores_are_of_the_stored_pictures(
    place: dict[str, str], tmp_path: Path, generator: Generator
) -> None:
    from models.losses.perceptual import load_perceptual

    job = make_edit_job(
        place["source"],
        variant("older", {place["turn"]: 2.0}),
        variant("same"),
        perceptual="refinery",
    )
    editor = Editor(job, "cpu")
    assert editor.layout.metrics == ("drift@older", "nscd@older", "drift@same", "nscd@same")
    run_edits(str(tmp_path / "out"), job)
    found = pictures(str(tmp_path / "out"))
    distance = load_perceptual("refinery")
    rows = query(str(tmp_path / "out"), "SELECT * FROM edits ORDER BY variant, sample_key")
    assert rows.column_names == ["sample_key", "variant", "drift", "nscd", "run"]
    values = {(r["variant"], r["sample_key"]): r for r in rows.to_pylist()}
    assert len(values) == 10

    def image(name: str, key: str) -> torch.Tensor:
        return torch.from_numpy(found[name][key].copy()).permute(2, 0, 1)[None] / 127.5 - 1

    for key in found["older"]:
        with fixed_threads(1):
            want = float(distance(image("inversion", key), image("older", key)))
        assert values["older", key]["drift"] == pytest.approx(want, rel=1e-4)
        assert values["same", key]["drift"] == 0
        assert values["older", key]["nscd"] != values["same", key]["nscd"]


def test_a_picture_that_is_not_finite_is_a_failed_row(
    place: dict[str, str], generator: Generator, tmp_path: Path
) -> None:
    far = write_direction(generator, tmp_path / "far.json", unit=3e38)
    job = make_edit_job(place["source"], variant("far", {far: 1.0}))
    markers = run_edits(str(tmp_path / "out"), job)
    assert markers[0].failures == {"not_finite": 4}
    row = query(str(tmp_path / "out"), "SELECT * FROM latents ORDER BY sample_key").to_pylist()[0]
    assert row["error"] == "the picture far is not finite"
    assert row["w_plus"] is None


# ------------------------------------------------------------------ plan


def test_a_limit_takes_the_first_samples(place: dict[str, str], tmp_path: Path) -> None:
    specs = list(plan_source(place["source"], limit=5))
    assert [(s.id, s.members, s.num_samples, s.row_stop) for s in specs] == [
        (0, ("00000",), 4, 0),
        (1, ("00001",), 1, 1),
    ]
    run_edits(str(tmp_path / "out"), make_edit_job(place["source"], variant("same")), limit=2)
    seal(str(tmp_path / "out"))
    assert sorted(pictures(str(tmp_path / "out"))["same"]) == ["face-0.png", "face-1.png"]
    assert verify(str(tmp_path / "out")).problems == []
    with pytest.raises(ConfigError, match="limit is 0"):
        plan_source(place["source"], limit=0)


def test_only_finished_runs_of_inversions_are_edited(place: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no run here"):
        plan_source(str(tmp_path / "nowhere"))
    open_run = str(tmp_path / "open")
    shutil.copytree(place["source"], open_run)
    (tmp_path / "open" / "_SEALED.json").unlink()
    with pytest.raises(LedgerError, match=r"not finished.*its command again"):
        plan_source(open_run)
    run_edits(str(tmp_path / "out"), make_edit_job(place["source"], variant("same")))
    edited = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"the codes of another run.*" + place["source"]):
        Editor(make_edit_job(edited, variant("same")), "cpu")


def test_a_source_that_was_made_again_is_noticed(place: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(place["source"], source)
    first, _ = plan_source(str(source))
    assert source_marker(first).rows == 4
    marker = source / "commits" / "00000.json"
    record = json.loads(marker.read_text())
    record["parts"]["latents"]["sha256"] = "0" * 64
    marker.write_text(json.dumps(record))
    with pytest.raises(ShardError, match="shard 00000 is not the same since"):
        source_marker(first)
    marker.unlink()
    with pytest.raises(ShardError, match="shard 00000 is gone since"):
        source_marker(first)


def test_verify_finds_a_lost_row(place: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_edits(str(out), make_edit_job(place["source"], variant("same")))
    seal(str(out))
    (out / "commits" / "00001.json").unlink()
    assert any("00001" in problem for problem in verify(str(out)).problems)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "there is none"),
        (("a", "a"), "'a' stands twice"),
        (("inversion",), "'inversion' is the name of another picture"),
        (("a@b",), "'a@b'"),
        (("",), "''"),
    ],
)
def test_names_that_cannot_be_columns(
    place: dict[str, str], names: tuple[str, ...], reason: str
) -> None:
    job = make_edit_job(place["source"], *(variant(name) for name in names))
    with pytest.raises(ConfigError, match=reason):
        Editor(job, "cpu")


def test_what_belongs_to_another_generator_is_refused(
    place: dict[str, str], tmp_path: Path
) -> None:
    other = make_tiny_generator(seed=9)
    stranger = write_direction(other, tmp_path / "turn.json")
    with pytest.raises(AssetError, match="direction turn: it was made for generator"):
        Editor(make_edit_job(place["source"], variant("a", {stranger: 1.0})), "cpu")
    stranger = write_domain(other, tmp_path / "style")
    with pytest.raises(AssetError, match="domain style: it was made for generator"):
        Editor(make_edit_job(place["source"], variant("a", domains={stranger: 1.0})), "cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"edits": {"agee": 1.0}}, "direction 'agee' is unknown"),
        ({"domains": {"impast": 1.0}}, "domain 'impast'"),
        ({"blends": (BlendConfig(sample_key="zz-0.png"),)}, "no inverted sample 'zz-0.png'"),
        ({"blends": (BlendConfig(sample_key="face-0.png", rows=(8,)),)}, r"rows in 0\.\.7"),
    ],
)
def test_what_is_not_there_is_refused(
    place: dict[str, str], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        Editor(make_edit_job(place["source"], variant("a", **changes)), "cpu")


def test_job_survives_run_json(place: dict[str, str], tmp_path: Path) -> None:
    job = make_edit_job(
        place["source"],
        variant(
            "all",
            {place["turn"]: 1.5},
            {place["style"]: 0.5},
            blends=(BlendConfig(sample_key="face-0.png", share=0.25, rows=(1, 2)),),
            residual=0.5,
        ),
        output=OutputConfig(pictures=("inversion",), picture_format="webp"),
    )
    run_edits(str(tmp_path / "out"), job)
    assert load_job(str(tmp_path / "out")) == job
    assert set(pictures(str(tmp_path / "out"))) == {"inversion", "all"}

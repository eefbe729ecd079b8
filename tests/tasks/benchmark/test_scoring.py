"""The benchmark's own measures: consistency, masks, drift, and a whole run scored."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.attributes import load_attributes
from models.editing.direction import Direction
from models.inversion.base import Inversion, Method, SampleRng
from models.losses.frechet import FrechetFeatures
from models.losses.perceptual import load_perceptual
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from models.stylegan2.residual import LowRank
from tasks.benchmark import scoring
from tasks.benchmark.chains import Editing
from tasks.benchmark.scoring import (
    Edit,
    Instruments,
    Stored,
    drift_outside,
    edit_mask,
    edit_strengths,
    editing_consistency,
    edits_for,
    read_stored,
    score_run,
    trimmed_mean,
)
from tasks.work.invert import Inverter
from tests.tasks.small_run import begin, make_job, write_pictures


def make_edit(generator: Generator, strength: float = 3.0, name: str = "age") -> Edit:
    vector = torch.nn.functional.normalize(torch.arange(1.0, generator.w_dim + 1), dim=0)
    direction = Direction(
        name=name, vector=vector, unit=0.2, generator_hash=weights_hash(generator)
    )
    return Edit(direction=direction, strength=strength)


class Colours:
    """A face network that knows a person by the mean colours of a 4 x 4 grid."""

    name, hash = "identity", "0" * 64

    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) <= scoring.BATCH
        small = torch.nn.functional.adaptive_avg_pool2d(images, 4)
        return torch.nn.functional.normalize(small.flatten(1), dim=1)

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(1)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return Colours().compare(Colours().features(a), Colours().features(b))


class Remembers(Method):
    """An encoder that is told the codes it will be asked for, off by a constant."""

    summary = "for tests"

    def __init__(self, generator: Generator, codes: torch.Tensor, error: float) -> None:
        super().__init__(generator, None)
        self.codes, self.error = codes, error
        self.net = torch.nn.Linear(3, 4)
        self.inner = SimpleNamespace()

    def invert(self, images: torch.Tensor, init: Inversion | None, rng: SampleRng) -> Inversion:
        expected = self.generator.synthesis(self.codes).clamp(-1, 1)
        torch.testing.assert_close(images, expected)
        return Inversion(w_plus=self.codes + self.error)


def test_a_perfect_encoder_is_perfectly_consistent(tiny_generator: Generator) -> None:
    codes = tiny_generator.mapping(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    edit = make_edit(tiny_generator)
    found = Inversion(w_plus=codes)
    perfect = Remembers(tiny_generator, edit(codes), 0.0)
    values = editing_consistency(found, edit, tiny_generator, perfect, w_std=2.0)
    torch.testing.assert_close(values, torch.zeros(3), atol=1e-6, rtol=0)
    # An error of 0.1 in every one of L D numbers: 0.1 sqrt(L D) / (sqrt(L) 2).
    off = Remembers(tiny_generator, edit(codes), 0.1)
    values = editing_consistency(found, edit, tiny_generator, off, w_std=2.0)
    torch.testing.assert_close(values, torch.full((3,), 0.1 * 16**0.5 / 2), rtol=1e-4, atol=0)


def test_outliers_are_trimmed() -> None:
    values = torch.ones(101)
    values[0], values[100] = -1e6, 1e6
    assert trimmed_mean(values) == 1.0
    assert trimmed_mean(torch.tensor([2.0])) == 2.0


def test_the_mask_is_the_half_that_changes_most() -> None:
    before = torch.zeros(2, 3, 64, 64)
    after = before.clone()
    after[0, :, :, :32] = 0.5
    after[1, 1, 32:] = -0.1
    mask = edit_mask(before, after)
    assert mask.shape == (2, 1, 64, 64)
    assert mask.flatten(1).sum(1).tolist() == [2048, 2048]
    # The blur is 5 px wide: two columns and rows at the border may go either way.
    assert mask[0, 0, :, :30].all()
    assert not mask[0, 0, :, 34:].any()
    assert mask[1, 0, 34:].all()
    assert not mask[1, 0, :30].any()


def test_drift_counts_what_is_outside_only() -> None:
    perceptual = load_perceptual("refinery")
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[:, :, :, :32] = True
    inside, outside = picture.clone(), picture.clone()
    inside[..., :32] = 0
    outside[1, ..., 40:] = 0
    assert drift_outside(picture, inside, mask, perceptual).tolist() == [0.0, 0.0]
    found = drift_outside(picture, outside, mask, perceptual)
    assert found[0] == 0
    assert found[1] == pytest.approx(float(perceptual(picture, outside)[1]), rel=1e-5)


def test_a_run_is_scored_from_what_it_stored(
    tiny_generator: Generator, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    job = make_job(tiny_generator, tmp_path, perceptual="refinery")
    inverter = Inverter(job, "cpu")
    pictures = write_pictures(tmp_path / "in", face_bytes, broken=0)
    run = begin(str(tmp_path / "out"), str(pictures), job, inverter).finish()
    judges = Instruments(
        generator=inverter.generator,
        perceptual=load_perceptual("refinery"),
        features=FrechetFeatures(),
        edits=(make_edit(tiny_generator), make_edit(tiny_generator, -3.0)),
        w_std=statistics_for(tiny_generator).w_std,
        faces=(Colours(),),
        attributes=load_attributes(),
    )
    found = score_run(run.uri, judges, inverter, has_reencoder=False)
    stored = read_stored(run.uri, tiny_generator)
    render = stored.inversion.render(tiny_generator).clamp(-1, 1)
    assert found["pictures"] == 8
    assert found["mse"] == pytest.approx(float((render - stored.inputs).square().mean()), rel=1e-2)
    assert found["psnr"] < 40
    assert found["nscd"] > 0
    assert set(found["edits"]) == {"age+3", "age-3"}
    assert found["frechet_edited"] == pytest.approx(
        sum(edit["frechet"] for edit in found["edits"].values()) / 2
    )
    assert (found["lec"], found["parameters"], found["bytes_per_picture"]) == (None, 0, 0.0)
    assert found["images_per_s"] > 0
    assert found["seconds_per_image"] > 0

    assert found["identity"] == pytest.approx(float(cosines(render, stored.inputs).mean()))
    edited, aged = [], []
    for edit in judges.edits:
        after = stored.inversion.edited(tiny_generator, edit(stored.inversion.w_plus))
        pictures = after.render(tiny_generator).clamp(-1, 1)
        edited.append(cosines(pictures, stored.inputs).mean())
        ages = (judges.attributes.logits(x)["age"].mean() for x in (render, pictures))
        aged.append(float(torch.stack([*ages]).diff()) * (1 if edit.strength > 0 else -1))
    assert found["identity_edited"] == pytest.approx(float(sum(edited)) / 2)
    assert found["age_change"] == pytest.approx(sum(aged) / 2, abs=1e-4)
    assert found["edits"]["age-3"]["change"]["age"] == pytest.approx(-aged[1], abs=1e-4)
    assert "smile_change" not in found  # no edit of it was asked for


def test_an_edit_goes_as_far_and_keeps_as_much_as_the_chain_says(tiny_generator: Generator) -> None:
    w_plus = tiny_generator.mapping(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    shape = tiny_generator.activations(w_plus, 3, "const", None).shape
    f = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, edit = Inversion(w_plus=w_plus, features={3: f}), make_edit(tiny_generator)
    editing = Editing(kept=0.5, times=1.5)
    stored = Stored(inversion=found, inputs=torch.zeros(2, 3, 32, 32), editing=editing)
    moved = edit.direction.apply(w_plus, 1.5 * edit.strength)
    torch.testing.assert_close(stored.moved(edit), moved)
    want = found.edited(tiny_generator, moved, 0.5).render(tiny_generator)
    got = stored.edited(tiny_generator, edit).render(tiny_generator)
    torch.testing.assert_close(got, want)
    plain = Stored(inversion=found, inputs=stored.inputs).edited(tiny_generator, edit)
    assert not torch.allclose(got, plain.render(tiny_generator), atol=1e-2)


def test_scores_do_not_depend_on_how_many_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
    tiny_generator: Generator,
    tmp_path: Path,
    face_bytes: list[bytes],
) -> None:
    job = make_job(tiny_generator, tmp_path, perceptual="refinery")
    inverter = Inverter(job, "cpu")
    judges = Instruments(
        generator=inverter.generator,
        perceptual=load_perceptual("refinery"),
        features=FrechetFeatures(),
        edits=(make_edit(tiny_generator),),
        w_std=statistics_for(tiny_generator).w_std,
        faces=(Colours(),),
        attributes=load_attributes(),
    )
    pictures = write_pictures(tmp_path / "in", face_bytes, broken=0)
    run = begin(str(tmp_path / "out"), str(pictures), job, inverter).finish()
    wanted = score_run(run.uri, judges, inverter, has_reencoder=True)
    monkeypatch.setattr(scoring, "BATCH", 3)
    found = score_run(run.uri, judges, inverter, has_reencoder=True)
    names = ("identity", "identity_edited", "age_change", "frechet_edited", "drift_edited")
    assert [found[n] for n in names] == pytest.approx([wanted[n] for n in names], rel=1e-3)


def test_a_strong_edit_is_one_in_its_own_direction(tiny_generator: Generator) -> None:
    edits = [make_edit(tiny_generator, s) for s in (3.0, -3.0)]
    edits.append(make_edit(tiny_generator, 3.0, "smile"))
    changes = ({"age": 10.0, "smile": 0.1}, {"age": -6.0, "smile": 9.0}, {"age": 1.0, "smile": 2.0})
    scores = {edit.name: {"change": c} for edit, c in zip(edits, changes, strict=True)}
    assert edit_strengths(edits, scores) == {"age_change": 8.0, "smile_change": 2.0}
    # Both edits making older is no control of age.
    scores["age-3"]["change"] = {"age": 10.0}
    assert edit_strengths(edits[:2], scores) == {"age_change": 0.0}
    assert edit_strengths(edits[:1], {"age+3": {}}) == {}


def test_drift_sees_a_residual_that_an_edit_wakes(tiny_generator: Generator) -> None:
    """An edit of no strength drifts nowhere, with every door open."""
    out, inside = tiny_generator.conv(0).conv.weight.shape[1:3]
    residual = {0: LowRank(u=torch.ones(1, out, 1), v=torch.ones(1, 1, inside, 3, 3))}
    codes = tiny_generator.latent_avg.expand(1, tiny_generator.num_ws, -1).clone()
    found = Inversion(w_plus=codes, residual=residual)
    still = make_edit(tiny_generator, 0.0)
    edited = found.edited(tiny_generator, still(codes)).render(tiny_generator)
    torch.testing.assert_close(edited, found.render(tiny_generator))


def test_the_protocols_edits_are_those_that_have_a_direction(tiny_generator: Generator) -> None:
    age = make_edit(tiny_generator).direction
    assert [edit.name for edit in edits_for({"age": age})] == ["age+3", "age-3"]
    assert edits_for({}) == ()

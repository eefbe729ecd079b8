"""The method `wplus`: schedule, noise penalty, per-picture stops and failures, best so far."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.errors import ConfigError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.lsap_o import LsapOConfig
from models.inversion.noise_maps import noise_penalty
from models.inversion.registry import load_method
from models.inversion.wplus import SearchSchedule, WPlus, WPlusConfig, _Search
from models.losses.style_space import StyleSpace
from models.statistics import statistics_for
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank

PLAIN = {"perceptual": "none"}


def targets(generator: Generator, n: int = 3, seed: int = 5) -> torch.Tensor:
    """Pictures that the generator can draw."""
    z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    return generator.synthesis(generator.mapping(z))


def method(generator: Generator, **config: Any) -> WPlus:
    found = load_method("wplus", generator, **{**PLAIN, **config})
    assert isinstance(found, WPlus)
    return found


def errors(generator: Generator, found: Inversion, images: torch.Tensor) -> torch.Tensor:
    return (found.render(generator) - images).square().mean((1, 2, 3))


def average(generator: Generator, n: int) -> Inversion:
    return Inversion(w_plus=generator.latent_avg.expand(n, generator.num_ws, -1).clone())


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -3}, "steps must be >= 0, got -3"),
        ({"learning_rate": 0.0}, r"learning_rate must be > 0, got 0\.0"),
        ({"ramp_down": 1.5}, r"ramp_down must be in 0\.\.1, got 1\.5"),
        ({"noise_weight": float("nan")}, "noise_weight must be >= 0, got nan"),
        ({"space": "z"}, "space: expected .* found 'z'"),
        ({"mse_weight": 0.0, "perceptual": "none"}, "nothing to minimise"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WPlusConfig(**settings)


def test_schedule_is_the_projectors() -> None:
    schedule = SearchSchedule(
        steps=1000,
        learning_rate=0.1,
        ramp_up=0.05,
        ramp_down=0.25,
        code_noise=0.05,
        code_noise_end=0.75,
    )
    for step in (0, 10, 49, 50, 400, 749, 750, 900, 999):
        t = step / 1000
        ramp = 0.5 - 0.5 * math.cos(math.pi * min(1, (1 - t) / 0.25))
        assert schedule.rate(step) == pytest.approx(0.1 * ramp * min(1, t / 0.05))
        assert schedule.noise(step) == pytest.approx(0.05 * max(0, 1 - t / 0.75) ** 2)
    assert schedule.rate(400) == pytest.approx(0.1)
    assert schedule.rate(999) < 1e-5
    assert schedule.noise(0) == pytest.approx(0.05)


def test_presets_depend_on_the_start(tiny_generator: Generator) -> None:
    wplus = method(tiny_generator)
    searching, refining = wplus.schedule(True), wplus.schedule(False)
    assert (searching.learning_rate, searching.ramp_up, searching.code_noise) == (0.1, 0.05, 0.05)
    assert (refining.learning_rate, refining.ramp_up, refining.code_noise) == (0.08, 0.0, 0.0)
    fixed = method(tiny_generator, learning_rate=0.02, ramp_up=0.1, code_noise=0.01)
    assert fixed.schedule(True) == fixed.schedule(False)
    assert fixed.schedule(True).learning_rate == 0.02


# ---------------------------------------------------------------------- noise maps


def test_noise_penalty_is_the_projectors_for_each_picture() -> None:
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 1, size, size, generator=rng) for size in (4, 8, 32)]
    maps[2][1] = maps[2][1].cumsum(1) / 4  # far from white

    def reference(row: int) -> float:
        total = 0.0
        for noise_map in maps:
            level = noise_map[row : row + 1].double()
            while True:
                total += float((level * level.roll(1, 3)).mean() ** 2)
                total += float((level * level.roll(1, 2)).mean() ** 2)
                if level.shape[2] <= 8:
                    break
                n = level.shape[2] // 2
                level = level.reshape(1, 1, n, 2, n, 2).mean((3, 5))
        return total

    found = noise_penalty(maps, 2)
    assert found.tolist() == pytest.approx([reference(0), reference(1)], rel=1e-4)
    assert found[1] > 4 * found[0]


def test_optimised_noise_maps_stay_normal_and_make_the_result(tiny_generator: Generator) -> None:
    images = targets(tiny_generator)
    found = method(tiny_generator, steps=12, optimise_noise=True).invert(
        images, None, SampleRng([1, 2, 3])
    )
    assert found.noise is not None
    assert [tuple(m.shape) for m in found.noise] == [
        (3, 1, s, s) for s in (4, 8, 8, 16, 16, 32, 32)
    ]
    for noise_map in found.noise:
        assert noise_map.mean((1, 2, 3)).abs().max() < 1e-5
        torch.testing.assert_close(noise_map.square().mean((1, 2, 3)), torch.ones(3))
        assert (noise_map[0] - noise_map[1]).abs().max() > 0.5
    codes_alone = Inversion(w_plus=found.w_plus)
    assert (
        errors(tiny_generator, found, images) < errors(tiny_generator, codes_alone, images)
    ).any()


# ---------------------------------------------------------------------- the search


@pytest.mark.parametrize("space", ["w", "w_plus"])
def test_it_finds_what_the_generator_drew(tiny_generator: Generator, space: str) -> None:
    images = targets(tiny_generator)
    start = average(tiny_generator, 3)
    found = method(tiny_generator, steps=60, space=space).invert(images, None, SampleRng([1, 2, 3]))
    before, after = (errors(tiny_generator, x, images) for x in (start, found))
    assert (after < 0.25 * before).all(), (before, after)
    assert found.w_plus.dtype == torch.float32
    spread = (found.w_plus - found.w_plus[:, :1]).abs().max()
    assert (spread == 0) if space == "w" else (spread > 1e-3)


def test_twenty_steps_improve_a_start(tiny_generator: Generator) -> None:
    images = targets(tiny_generator)
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    near = tiny_generator.mapping(z) + 0.2 * torch.randn(
        3, 8, 16, generator=torch.Generator().manual_seed(6)
    )
    start = Inversion(w_plus=near)
    found = method(tiny_generator, steps=20, perceptual="refinery").invert(
        images, start, SampleRng([1, 2, 3])
    )
    before, after = (errors(tiny_generator, x, images) for x in (start, found))
    assert (after < 0.6 * before).all(), (before, after)


def test_the_best_code_is_kept(tiny_generator: Generator) -> None:
    images = targets(tiny_generator)
    start = method(tiny_generator, steps=40).invert(images, None, SampleRng([1, 2, 3]))
    # A rate this high only makes it worse: the start must come back.
    wild = method(tiny_generator, steps=5, learning_rate=50.0, ramp_down=0.0)
    found = wild.invert(images, start, SampleRng([1, 2, 3]))
    assert torch.equal(found.w_plus, start.w_plus)


def test_zero_steps_keep_the_start(tiny_generator: Generator) -> None:
    images = targets(tiny_generator)
    start = Inversion(w_plus=average(tiny_generator, 3).w_plus + 0.1)
    found = method(tiny_generator, steps=0).invert(images, start, SampleRng([1, 2, 3]))
    assert torch.equal(found.w_plus, start.w_plus)
    assert not found.failures


def test_pictures_stop_one_by_one(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = targets(tiny_generator)
    start = average(tiny_generator, 3).w_plus
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    start[1] = tiny_generator.mapping(z)[1]  # the second picture is solved from the outset
    batches: list[int] = []
    synthesis = tiny_generator.synthesis

    def counted(w_plus: torch.Tensor, *args: Any) -> torch.Tensor:
        batches.append(len(w_plus))
        return synthesis(w_plus, *args)

    monkeypatch.setattr(tiny_generator, "synthesis", counted)
    rng = SampleRng([1, 2, 3])
    found = method(tiny_generator, steps=6, stop_loss=1e-6).invert(
        images, Inversion(w_plus=start), rng
    )
    assert batches == [3, 2, 2, 2, 2, 2, 2]
    assert torch.equal(found.w_plus[1], start[1])
    alone = method(tiny_generator, steps=6, stop_loss=1e-6).invert(
        images[[0, 2]], Inversion(w_plus=start[[0, 2]]), SampleRng([1, 3])
    )
    torch.testing.assert_close(found.w_plus[[0, 2]], alone.w_plus, atol=1e-4, rtol=1e-4)
    batches.clear()
    patient = method(tiny_generator, steps=30, patience=2, learning_rate=50.0, ramp_down=0.0)
    patient.invert(images[:1], Inversion(w_plus=start[:1]), SampleRng([1]))
    assert len(batches) < 30


# ---------------------------------------------------------------------- failures


def break_row(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, how: Callable[[torch.Tensor], None]
) -> None:
    """From the third render on, `how` spoils the picture of the second row of a full batch."""
    synthesis, calls = generator.synthesis, [0]

    def spoiled(w_plus: torch.Tensor, *args: Any) -> torch.Tensor:
        calls[0] += 1
        images = synthesis(w_plus, *args)
        if calls[0] == 3 and len(w_plus) == 3:
            images = images.clone()
            how(images)
        return images

    monkeypatch.setattr(generator, "synthesis", spoiled)


def nan_loss(images: torch.Tensor) -> None:
    images[1] = float("nan")


def nan_gradient(images: torch.Tensor) -> None:
    images.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("inf")))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (nan_loss, "loss is not finite at step 2"),
        (nan_gradient, "gradient is not finite at step 2"),
    ],
)
@pytest.mark.parametrize("optimise_noise", [False, True])
def test_a_row_that_diverges_fails_alone(
    tiny_generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[torch.Tensor], None],
    reason: str,
    optimise_noise: bool,
) -> None:
    images = targets(tiny_generator)
    wplus = method(tiny_generator, steps=8, optimise_noise=optimise_noise)
    alone = wplus.invert(images[[0, 2]], None, SampleRng([1, 3]))
    break_row(tiny_generator, monkeypatch, how)
    found = wplus.invert(images, None, SampleRng([1, 2, 3]))
    assert found.failures == {1: f"wplus: {reason}"}
    assert found.w_plus.isfinite().all()
    # Six more steps after the failure: a trace of it in Adam's moments would show here.
    torch.testing.assert_close(found.w_plus[[0, 2]], alone.w_plus, atol=1e-4, rtol=1e-4)


def test_earlier_failures_are_carried_and_cost_nothing(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = targets(tiny_generator)
    images[0] = float("nan")
    start = average(tiny_generator, 3)
    start = Inversion(w_plus=start.w_plus, failures={0: "e4e: broken"})
    found = method(tiny_generator, steps=3).invert(images, start, SampleRng([1, 2, 3]))
    assert found.failures == {0: "e4e: broken"}
    everything = Inversion(w_plus=start.w_plus, failures=dict.fromkeys(range(3), "gone"))
    monkeypatch.delattr(Generator, "synthesis")
    assert (
        len(
            method(tiny_generator, steps=3)
            .invert(images, everything, SampleRng([1, 2, 3]))
            .failures
        )
        == 3
    )


def test_the_other_doors_of_the_start_stay_open(tiny_generator: Generator) -> None:
    rng = torch.Generator().manual_seed(3)
    features = {3: torch.randn(3, 8, 8, 8, generator=rng)}
    features = {2: tiny_generator.activations(average(tiny_generator, 3).w_plus, 2) * 1.5}
    residual = {
        1: LowRank(
            u=torch.randn(3, 16, 2, generator=rng), v=torch.randn(3, 2, 16, 3, 3, generator=rng)
        )
    }
    start = Inversion(
        w_plus=average(tiny_generator, 3).w_plus, features=features, residual=residual
    )
    images = targets(tiny_generator)
    found = method(tiny_generator, steps=15).invert(images, start, SampleRng([1, 2, 3]))
    assert found.features is not None
    assert torch.equal(found.features[2], features[2])
    assert found.residual is not None
    before, after = (errors(tiny_generator, x, images) for x in (start, found))
    assert (after < before).all()


def test_it_runs_inside_inference_mode(tiny_generator: Generator) -> None:
    images = targets(tiny_generator)
    plain = method(tiny_generator, steps=4).invert(images, None, SampleRng([1, 2, 3]))
    with torch.inference_mode():
        again = method(tiny_generator, steps=4).invert(images.clone(), None, SampleRng([1, 2, 3]))
    assert torch.equal(again.w_plus, plain.w_plus)


# ---------------------------------------------------------------------- LSAP_O


def nscd(generator: Generator, found: Inversion) -> torch.Tensor:
    return StyleSpace(generator, statistics_for(generator).style_anchor).nscd(found.w_plus)


def test_the_alignment_term_is_the_mean_form_of_the_codes(tiny_generator: Generator) -> None:
    """Nothing else to gain: the start already renders the pictures, so the term alone moves it."""
    z = torch.randn(3, tiny_generator.z_dim, generator=torch.Generator().manual_seed(5))
    start = Inversion(w_plus=tiny_generator.mapping(z))
    images = start.render(tiny_generator)
    settings = {"steps": 1, "learning_rate": 0.01, "ramp_down": 0.0, "nscd_weight": 2.0}
    search = _Search(method(tiny_generator, **settings), images, start, False, SampleRng([1, 2, 3]))
    with torch.no_grad():
        loss, _ = search.loss(search.adam.tensors)
    torch.testing.assert_close(loss, 2.0 * nscd(tiny_generator, start), rtol=1e-4, atol=1e-6)
    found = search.run()
    assert (nscd(tiny_generator, found) < nscd(tiny_generator, start)).all()
    without = method(tiny_generator, **{**settings, "nscd_weight": 0.0})
    still = without.invert(images, start, SampleRng([1, 2, 3]))
    torch.testing.assert_close(still.w_plus, start.w_plus)


def test_lsap_o_is_wplus_with_the_term(tiny_generator: Generator) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def codes(wplus: Method) -> Inversion:
        return wplus.invert(images, None, SampleRng([1, 2]))

    aligned = codes(load_method("lsap_o", tiny_generator, **PLAIN, steps=30))
    by_hand = codes(method(tiny_generator, steps=30, nscd_weight=0.25))
    plain = codes(method(tiny_generator, steps=30))
    assert torch.equal(aligned.w_plus, by_hand.w_plus)
    assert (nscd(tiny_generator, aligned) < 0.8 * nscd(tiny_generator, plain)).all()


def test_the_weight_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match=r"nscd_weight must be >= 0, got -0\.1"):
        LsapOConfig(nscd_weight=-0.1)

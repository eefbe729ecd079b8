"""`refine_opt`: tokens of each picture, optimised a batch at once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.errors import ConfigError
from models.inversion.base import Inversion, SampleRng
from models.inversion.refine_opt import RefineOpt, RefineOptConfig, _TokenSearch
from models.inversion.registry import load_method
from models.inversion.row_search import RowSearch
from models.losses.perceptual import load_perceptual
from models.stylegan2.generator import Generator
from models.stylegan2.synthesis_layers import StyledConv
from models.stylegan2.tokens import FACTORIZATIONS
from tests.test_method_contract import pictures

PLAIN: dict[str, Any] = {"perceptual": "none", "learning_rate": 0.05}


def seeds() -> SampleRng:
    return SampleRng([1, 2, 3])  # fresh streams: drawing from them moves them on


def start(generator: Generator, n: int = 3) -> Inversion:
    return Inversion(w_plus=generator.latent_avg.expand(n, generator.num_ws, -1).clone())


def error(found: Inversion, generator: Generator) -> torch.Tensor:
    return (found.render(generator) - pictures()[: len(found)]).square().mean((1, 2, 3))


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_it_descends_within_its_rank_and_keeps_the_codes(
    factorization: str, tiny_generator: Generator
) -> None:
    method = load_method(
        "refine_opt", tiny_generator, **PLAIN, steps=12, rank=1, factorization=factorization
    )
    init = start(tiny_generator)
    found = method.invert(pictures(), init, seeds())
    assert torch.equal(found.w_plus, init.w_plus)
    assert (error(found, tiny_generator) < 0.8 * error(init, tiny_generator)).all()
    assert found.residual is not None
    for low_rank in found.residual.values():
        kernel = low_rank.kernel()
        if factorization == "per_tap":
            rank = torch.linalg.matrix_rank(kernel.permute(0, 3, 4, 1, 2))
        elif factorization == "conv_lora":
            rank = torch.linalg.matrix_rank(kernel.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2))
        else:
            rank = torch.linalg.matrix_rank(kernel.flatten(2))
        assert rank.max() <= 1


def test_no_steps_is_the_start_exactly(tiny_generator: Generator) -> None:
    init = start(tiny_generator)
    found = load_method("refine_opt", tiny_generator, **PLAIN, steps=0).invert(
        pictures(), init, seeds()
    )
    assert torch.equal(found.render(tiny_generator), init.render(tiny_generator))


def test_the_gradient_reaches_both_sets_after_one_step(tiny_generator: Generator) -> None:
    method = RefineOpt(tiny_generator, RefineOptConfig(**PLAIN))
    search = _TokenSearch(method, pictures(), start(tiny_generator), seeds())

    def gradients() -> tuple[list[bool], list[bool]]:
        tensors = [t.detach().requires_grad_() for t in search.adam.tensors]
        found = torch.autograd.grad(search.loss(tensors)[0].sum(), tensors)
        reached = [bool(g.any()) for g in found]
        search.adam.step(found, 0.01)
        return reached[::2], reached[1::2]

    p, q = gradients()
    assert not any(p)
    assert all(q)
    p, q = gradients()
    assert all(p)
    assert all(q)


def test_what_is_stored_renders_the_same(tiny_generator: Generator) -> None:
    """Half precision in `residuals/` costs nothing that can be seen."""
    method = load_method("refine_opt", tiny_generator, **PLAIN, steps=8)
    found = method.invert(pictures(), start(tiny_generator), seeds())
    read = Inversion.from_tensors(found.stored().tensors())
    torch.testing.assert_close(
        read.render(tiny_generator), found.render(tiny_generator), atol=5e-3, rtol=0
    )


def test_codes_move_by_their_own_rate(tiny_generator: Generator) -> None:
    """Adam's first update is its rate, whatever the gradient."""
    settings = {**PLAIN, "steps": 2, "ramp_down": 0.0, "code_rate": 0.003}
    init = start(tiny_generator)
    found = load_method("refine_opt", tiny_generator, **settings).invert(pictures(), init, seeds())
    moved = (found.w_plus - init.w_plus).abs()
    assert moved.max() <= 2 * 0.003 * 1.01
    assert moved.median() > 0.003


def test_layers_and_a_residual_that_is_there(tiny_generator: Generator) -> None:
    method = load_method("refine_opt", tiny_generator, **PLAIN, steps=4, rank=1, layers=[1, 4])
    first = method.invert(pictures(), start(tiny_generator), seeds())
    assert first.residual is not None
    assert sorted(first.residual) == [1, 4]
    both = method.invert(pictures(), first, seeds())
    assert both.residual is not None
    assert both.residual[1].u.shape[2] == 2
    assert torch.equal(both.residual[1].v[:, :1], first.residual[1].v)
    assert (error(both, tiny_generator) <= error(first, tiny_generator)).all()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Active rows of every update."""
    found: list[int] = []
    step = RowSearch._step

    def counted(search: RowSearch, number: int) -> None:
        found.append(len(search.rows))
        step(search, number)

    monkeypatch.setattr(RowSearch, "_step", counted)
    return found


def test_each_picture_stops_by_itself(tiny_generator: Generator, counts: list[int]) -> None:
    """A picture below `stop_loss` costs nothing any more; the others go on as if it were not."""
    init = start(tiny_generator)
    targets = pictures()
    targets[1] = init[1:2].render(tiny_generator)[0]  # solved before it starts
    method = load_method("refine_opt", tiny_generator, **PLAIN, steps=4, stop_loss=1e-4)
    found = method.invert(targets, init, seeds())
    assert counts == [3, 2, 2, 2]
    assert found.residual is not None
    assert not found.residual[0].kernel()[1].any()
    alone = method.invert(targets[:1], init[0:1], SampleRng([1]))
    assert alone.residual is not None
    torch.testing.assert_close(found.residual[2].v[:1], alone.residual[2].v, atol=1e-4, rtol=1e-4)


def near(generator: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets that residuals reach, each another way off, and their distances from the start."""
    init, rng = start(generator), torch.Generator().manual_seed(3)
    settings = {**PLAIN, "steps": 1, "rank": 2, "mse_weight": 1.0}
    found = load_method("refine_opt", generator, **settings).invert(pictures(), init, seeds())
    assert found.residual is not None
    strength = torch.tensor([0.02, 0.5, 0.3]).view(3, 1, 1)
    other = {
        k: replace(r, u=strength * torch.randn(r.u.shape, generator=rng))
        for k, r in found.residual.items()
    }
    targets = replace(init, residual=other).render(generator)
    return targets, load_perceptual("refinery")(init.render(generator), targets)


@pytest.mark.timeout(600)
def test_each_picture_stops_at_its_perceptual_distance(
    tiny_generator: Generator, counts: list[int]
) -> None:
    """It keeps the render that it was stopped at, and costs nothing from then on."""
    init, perceptual = start(tiny_generator), load_perceptual("refinery")
    targets, before = near(tiny_generator)
    stop = 0.9 * before[1:].min().item()
    assert before[0] < stop
    settings = {"perceptual": "refinery", "steps": 40, "ramp_down": 0.0}
    method = load_method("refine_opt", tiny_generator, **settings, stop_perceptual=stop)
    counts.clear()  # the targets were searched for too
    found = method.invert(targets, init, seeds())
    assert counts[:2] == [3, 2]
    assert len(counts) < 40
    with torch.no_grad():
        after = perceptual(found.render(tiny_generator), targets)
    torch.testing.assert_close(after[0], before[0])
    assert (after <= stop + 1e-6).all()
    assert (after[1:] > 0.5 * stop).all()  # not searched to the end
    assert found.residual is not None
    alone = method.invert(targets[2:], init[2:3], SampleRng([3]))
    assert alone.residual is not None
    for layer, low_rank in alone.residual.items():
        kernel = found.residual[layer].kernel()[2:]
        torch.testing.assert_close(kernel, low_rank.kernel(), atol=1e-4, rtol=1e-3)


def test_looking_seldom_changes_nothing(tiny_generator: Generator) -> None:
    """A GPU is asked every few steps who is done: rows that are wait unchanged."""
    targets, before = near(tiny_generator)
    targets[2, 0, 0, 0] = float("inf")
    config = RefineOptConfig(steps=9, stop_perceptual=before[0].item() * 1.01)
    searches = []
    for interval in (1, 4):
        method = RefineOpt(tiny_generator, config)
        search = _TokenSearch(method, targets, start(tiny_generator), seeds())
        search.interval = interval
        search.descend()
        searches.append(search)
    often, seldom = searches
    assert often.failures == {2: "refine_opt: loss is not finite at step 0"} == seldom.failures
    torch.testing.assert_close(seldom.best_step, often.best_step)
    for one, other in zip(often.best, seldom.best, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_layers_before_the_first_refined_one_run_once(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**PLAIN, "steps": 4, "layers": [3, 4]}
    method = load_method("refine_opt", tiny_generator, **settings)
    init = start(tiny_generator)
    features = {2: 1.5 * tiny_generator.activations(init.w_plus, 2)}
    init = replace(init, features=features)
    ran: list[int] = []
    forward = StyledConv.forward
    numbers = {id(tiny_generator.conv(i)): i for i in range(tiny_generator.num_convs)}

    def counted(conv: StyledConv, *args: Any, **settings: Any) -> torch.Tensor:
        ran.append(numbers[id(conv)])
        return forward(conv, *args, **settings)

    monkeypatch.setattr(StyledConv, "forward", counted)
    found = method.invert(pictures(), init, seeds())
    assert ran.count(2) == 1
    assert ran.count(3) == 5
    monkeypatch.setattr(_TokenSearch, "_begun", lambda *_: None)
    whole = method.invert(pictures(), init, seeds())
    assert found.residual is not None
    assert whole.residual is not None
    torch.testing.assert_close(found.residual[4].v, whole.residual[4].v, atol=1e-4, rtol=1e-3)


def test_a_picture_that_diverges_fails_alone(tiny_generator: Generator) -> None:
    init = start(tiny_generator)
    init = replace(init, failures={2: "e4e: lost"})
    targets = pictures()
    targets[1, 0, 0, 0] = float("inf")
    found = load_method("refine_opt", tiny_generator, **PLAIN, steps=3).invert(
        targets, init, seeds()
    )
    assert found.failures == {1: "refine_opt: loss is not finite at step 0", 2: "e4e: lost"}
    assert found.residual is not None
    assert all(r.kernel().isfinite().all() for r in found.residual.values())
    assert found.residual[0].kernel()[0].any()
    assert not found.residual[0].kernel()[1:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"factorization": "full"}, "factorization: expected one of"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"steps": -1}, "steps must be >= 0"),
        ({"ramp_down": 2.0}, "ramp_down must be in"),
        ({"mse_weight": 0.0, "perceptual": "none"}, "nothing to minimise"),
        ({"stop_perceptual": -0.1}, "stop_perceptual must be >= 0"),
        ({"stop_perceptual": 0.1, "perceptual": "none"}, "needs the perceptual distance"),
        ({"stop_perceptual": 0.1, "perceptual_weight": 0.0}, "needs the perceptual distance"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RefineOptConfig(**settings)


def test_layers_that_are_not_there_are_refused(tiny_generator: Generator) -> None:
    with pytest.raises(ConfigError, match=r"3x3 layers in 0\.\.6, found 7"):
        load_method("refine_opt", tiny_generator, layers=[7], perceptual="none")

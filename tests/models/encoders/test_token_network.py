"""RefineStyle's token network: a start that changes nothing, gradients, groups, positions."""

from typing import Any

import pytest
import torch

from models.encoders.token_network import TokenArchitecture, TokenNetwork, sinusoids
from models.errors import ConfigError
from models.stylegan2.generator import Generator
from models.stylegan2.tokens import FACTORIZATIONS


def network(generator: Generator, **settings: Any) -> TokenNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return TokenNetwork(TokenArchitecture.tiny(generator, stem_stride=2, **settings))


def pictures(n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("grouping", ["resolution", "layer", "pq"])
def test_a_fresh_network_changes_nothing_and_learns_both_sets(
    factorization: str, grouping: str, tiny_generator: Generator
) -> None:
    """Q's heads are zero, so the first render is the first stage's; after one step of theirs, the
    gradient reaches P's heads as well."""
    net = network(tiny_generator, factorization=factorization, grouping=grouping)
    codes = tiny_generator.latent_avg.expand(2, tiny_generator.num_ws, -1)
    plain = tiny_generator.synthesis(codes)
    target = pictures(seed=1)

    def loss() -> torch.Tensor:
        residual = net(pictures(), plain).residual
        render = tiny_generator.synthesis(codes, "const", None, residual)
        return (render - target).square().mean()

    with torch.no_grad():
        residual = net(pictures(), plain).residual
        assert torch.equal(tiny_generator.synthesis(codes, "const", None, residual), plain)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    loss().backward()
    assert all(head.weight.grad.any() for head in net.heads_q)  # type: ignore[union-attr]
    assert not any(head.weight.grad.any() for head in net.heads_p)  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    assert all(head.weight.grad.any() for head in net.heads_p)  # type: ignore[union-attr]
    assert all(group.queries.grad.any() for group in net.groups)  # type: ignore[union-attr]
    stem = net.trunk.get_parameter("input_layer.0.weight").grad
    assert stem is not None
    assert stem[:, :3].any()  # the picture
    assert stem[:, 3:].any()  # and its reconstruction


def test_a_row_does_not_depend_on_its_neighbours(tiny_generator: Generator) -> None:
    net = network(tiny_generator).eval()
    for head in net.heads_q:
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    seen, made = pictures(3), pictures(3, seed=1)
    whole, alone = net(seen, made).residual, net(seen[1:2], made[1:2]).residual
    for layer, low_rank in alone.items():
        torch.testing.assert_close(low_rank.kernel(), whole[layer][1:2].kernel())
        assert low_rank.kernel().any()


def test_the_error_reaches_the_tokens_around_the_trunk(tiny_generator: Generator) -> None:
    """Same features, another error: by the thumbnail alone, and by the pixels beside the map."""
    net = network(tiny_generator).eval()
    maps = [torch.ones(1, 32, 2, 2)] * 3 + [torch.ones(1, 32, 4, 4)] * 5
    seen = torch.zeros(1, 6, 32, 32)
    group = net.groups[1]
    embedding = torch.zeros(8, 16)

    def change(error: torch.Tensor, picture: torch.Tensor) -> float:
        with torch.no_grad():
            plain = group(maps[4], seen, embedding)
            other = group(maps[4], torch.cat([picture, error], 1), embedding)
        return float((other - plain).abs().max())

    error, nothing = pictures(1) - pictures(1).mean(), torch.zeros(1, 3, 32, 32)
    assert change(nothing, nothing) == 0
    assert change(nothing, error) > 1e-3  # the picture's pixels, in the memory
    with torch.no_grad():
        group.memory.weight[:, -6:] = 0  # type: ignore[union-attr, index]
    assert change(nothing, error) == 0
    assert change(error, nothing) > 1e-3  # the error's thumbnail, in the queries


def test_groups_hold_every_set_once(tiny_generator: Generator) -> None:
    """Rows of one map together; by layer; or P and Q apart."""
    plans = {
        grouping: network(tiny_generator, grouping=grouping).plan
        for grouping in ("resolution", "layer", "pq")
    }
    every = sorted((layer, side) for layer in range(7) for side in (0, 1))
    assert [len(plan) for plan in plans.values()] == [2, 7, 4]  # 32 px: coarse and middle rows
    for plan in plans.values():
        assert sorted(pair for members in plan for pair in members) == every
    assert plans["resolution"][0] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert plans["pq"][0] == [(0, 0), (1, 0), (2, 0)]
    assert network(tiny_generator, layers=(1, 5)).plan == [[(1, 0), (1, 1)], [(5, 0), (5, 1)]]


def test_one_stage_writes_codes_too(tiny_generator: Generator) -> None:
    net = network(tiny_generator, stages="one")
    found = net(pictures())
    assert found.w is not None
    assert found.deltas is not None
    assert (found.w.shape, found.deltas.shape) == ((2, 16), (2, 7, 16))
    torch.testing.assert_close(net.trunk.split(pictures())[0], found.w)
    net.token_gain = 0.0
    assert not any(r.kernel().any() for r in net(pictures()).residual.values())
    with pytest.raises(ValueError, match="expected pictures alone"):
        net(pictures(), pictures())
    with pytest.raises(ValueError, match="expected pictures and their reconstructions"):
        network(tiny_generator)(pictures())


def test_two_stages_hold_no_style_heads(tiny_generator: Generator) -> None:
    assert not any("styles" in name for name in network(tiny_generator).state_dict())
    assert any("styles" in name for name in network(tiny_generator, stages="one").state_dict())


def test_sinusoids_tell_rows_from_columns() -> None:
    found = sinusoids(3, 4, 8, torch.zeros(1, dtype=torch.float64)).reshape(3, 4, 8)
    assert found[2, 1, 0] == pytest.approx(0.9092974268)  # sin 2
    assert found[2, 1, 3] == pytest.approx(0.9998000067)  # cos(2 / 100)
    assert found[2, 1, 4] == pytest.approx(0.8414709848)  # sin 1
    assert torch.equal(found[0, :, :4], found[0, :1, :4].expand(4, 4))
    assert torch.equal(found[:, 2, 4:], found[:1, 2, 4:].expand(3, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "three"}, "stages: expected one of two, one, found 'three'"),
        ({"grouping": "all"}, "grouping: expected one of resolution, layer, pq, found 'all'"),
        ({"token_width": 18}, r"token_width: expected a multiple of 4 and of heads \(2\)"),
        ({"depth": 0}, "depth must be >= 1"),
        ({"layers": (9,)}, r"3x3 layers in 0\.\.6, found 9"),
        ({"channels": ((8, 8),)}, "has 7 3x3 layers, found 1"),
    ],
)
def test_impossible_sizes_are_refused(
    settings: dict[str, Any], message: str, tiny_generator: Generator
) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenArchitecture.tiny(tiny_generator, **settings)


def test_architecture_survives_json(tiny_generator: Generator) -> None:
    import json

    architecture = network(tiny_generator, layers=(0, 2)).architecture
    again = TokenArchitecture(**json.loads(json.dumps(architecture.to_dict())))
    assert again == architecture

"""RefineStyle's token network: a start that changes nothing, gradients, groups, positions."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.encoders.pass_norm import PassNorm
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
    assert all(head.weight.grad.any() for head in net.writers[0].heads_q)  # type: ignore[union-attr]
    assert not any(head.weight.grad.any() for head in net.writers[0].heads_p)  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    assert all(head.weight.grad.any() for head in net.writers[0].heads_p)  # type: ignore[union-attr]
    assert all(group.queries.grad.any() for group in net.writers[0].groups)  # type: ignore[union-attr]
    stem = net.trunk.get_parameter("input_layer.0.weight").grad
    assert stem is not None
    assert stem[:, :3].any()  # the picture
    assert stem[:, 3:].any()  # and its reconstruction


def test_a_row_does_not_depend_on_its_neighbours(tiny_generator: Generator) -> None:
    net = network(tiny_generator).eval()
    for head in net.writers[0].heads_q:
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
    group = net.writers[0].groups[1]
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
        grouping: network(tiny_generator, grouping=grouping).writers[0].plan
        for grouping in ("resolution", "layer", "pq")
    }
    every = sorted((layer, side) for layer in range(7) for side in (0, 1))
    assert [len(plan) for plan in plans.values()] == [2, 7, 4]  # 32 px: coarse and middle rows
    for plan in plans.values():
        assert sorted(pair for members in plan for pair in members) == every
    assert plans["resolution"][0] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert plans["pq"][0] == [(0, 0), (1, 0), (2, 0)]
    assert network(tiny_generator, layers=(1, 5)).writers[0].plan == [
        [(1, 0), (1, 1)],
        [(5, 0), (5, 1)],
    ]


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


def test_a_second_pass_adds_to_the_tokens_of_the_first(tiny_generator: Generator) -> None:
    """Silent at first; then both of its sides learn, and it goes on from the first one's states."""
    net = network(tiny_generator, iterations=2)
    first_writer, second_writer = net.writers
    for head in first_writer.heads_q:  # type: ignore[union-attr]
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    seen, made, better = pictures(), pictures(seed=1), pictures(seed=2)
    first = net(seen, made)
    second = net(seen, better, first)
    for layer, low_rank in second.residual.items():
        assert torch.equal(low_rank.kernel(), first.residual[layer].kernel())
    sum(r.kernel().square().sum() for r in second.residual.values()).backward()
    for heads in (second_writer.heads_p, second_writer.heads_q):
        assert all(head.weight.grad.any() for head in heads)  # type: ignore[union-attr]

    for head in (*second_writer.heads_p, *second_writer.heads_q):  # type: ignore[misc]
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr]
    with torch.no_grad():
        second = net(seen, better, first)
        other = net(seen, made, first)  # another reconstruction is corrected by other tokens
        states = [state.flip(3) for state in first.sets.states]
        resumed = net(seen, better, replace(first, sets=replace(first.sets, states=states)))
    for layer, low_rank in second.residual.items():
        kernel = low_rank.kernel()
        assert low_rank.u.shape == first.residual[layer].u.shape  # no rank is added
        assert not torch.allclose(kernel, first.residual[layer].kernel(), rtol=1e-2)
        assert not torch.allclose(kernel, other.residual[layer].kernel(), rtol=1e-3)
        assert not torch.allclose(kernel, resumed.residual[layer].kernel(), rtol=1e-3)
    added = second.sets.p[0] - first.sets.p[0]
    torch.testing.assert_close(added, second_writer.heads_p[0](second.sets.states[0][:, 0]))  # type: ignore[index, operator]
    with pytest.raises(ValueError, match="all of its 2 passes are over"):
        net(seen, better, second)


def test_more_passes_begin_as_a_network_of_fewer(tiny_generator: Generator) -> None:
    one, two = network(tiny_generator), network(tiny_generator, iterations=2)
    for parameter in (*one.parameters(), *two.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    two.begin_as(one)
    one.eval()
    two.eval()
    seen, made = pictures(), pictures(seed=1)
    want, first = one(seen, made), two(seen, made)
    second = two(seen, made, first)
    for layer, low_rank in want.residual.items():
        assert torch.equal(first.residual[layer].kernel(), low_rank.kernel())
        assert torch.equal(second.residual[layer].kernel(), low_rank.kernel())
        assert low_rank.kernel().any()
    assert torch.equal(
        two.writers[1].get_parameter("layer_embedding"),
        one.writers[0].get_parameter("layer_embedding"),
    )
    with pytest.raises(ValueError, match="its iterations is 2, this run's 1"):
        one.begin_as(two)
    with pytest.raises(ValueError, match="its rank is 3, this run's 2"):
        two.begin_as(network(tiny_generator, rank=3))
    with pytest.raises(ValueError, match="its stages is one, this run's two"):
        two.begin_as(network(tiny_generator, stages="one"))
    two.begin_as(network(tiny_generator, head_width=16))  # two stages have no style heads


def test_each_pass_has_statistics_of_its_own(tiny_generator: Generator) -> None:
    """And uses them: after training on small errors the first pass still stands on large ones."""
    net = network(tiny_generator, iterations=2)
    for head in net.writers[0].heads_q:  # type: ignore[union-attr]
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    seen, made = pictures(8), pictures(8, seed=1)
    net.eval()
    before = net(seen, made)
    net.train()
    with torch.no_grad():
        for _ in range(40):
            net(seen, seen, before)  # the second pass alone, without an error
    net.eval()
    after = net(seen, made)
    for layer, low_rank in after.residual.items():
        assert torch.equal(low_rank.kernel(), before.residual[layer].kernel())
    norms = [m for m in net.trunk.modules() if isinstance(m, PassNorm)]
    assert norms
    first, second = norms[0].running_mean, norms[0].later[0].running_mean
    assert not torch.allclose(first, second)  # type: ignore[arg-type]

    # In training each pass is normalised as a plain network normalises it.
    plain = network(tiny_generator)
    net.begin_as(plain)
    plain.train()
    net.train()
    want, found = plain(seen, made), net(seen, made, net(seen, seen))
    for state, other in zip(want.sets.states, found.sets.states, strict=True):
        assert state.shape == other.shape
    maps = [m.trunk.pyramid(torch.cat([seen, made], 1), 8)[0] for m in (plain, net)]
    torch.testing.assert_close(*maps)


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
        ({"iterations": 0}, "iterations must be >= 1"),
        ({"iterations": 2, "stages": "one"}, "iterations: 2 passes look at a reconstruction"),
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

"""RefineStyle's network: grouped transformer blocks that read a picture and write token sets.

RefineStyle (arXiv 2410.06104) names the blocks and what they predict; no code and no sizes are
public. What is built here is inferred from the authors' style transformer (arXiv 2203.07932) and
said to be so in docs/methods.md: an IR-SE trunk with a feature pyramid, learned queries for the
tokens of P and of Q of every refined layer, and groups of layers that each read one map. Further
passes correct the tokens by what is still missing, as HyperStyle's do its offsets (arXiv
2111.15666); that is not RefineStyle's.

Legend: N batch, L num_ws, D w_dim, T tokens of a set, G token sets of a group, S tokens of a group
(G T), d token width, M places of a map, C channels, H W picture, h w map.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.checkpoint import Kinds, differing_sizes
from models.encoders.e4e import Encoder4Editing
from models.encoders.pass_norm import keep_apart
from models.encoders.psp import COARSE_ROWS, MIDDLE_ROWS, EncoderArchitecture, TrunkSizes
from models.errors import ConfigError
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank
from models.stylegan2.tokens import Factorization, TokenLayout, kernel_channels, token_layouts

Stages = Literal["two", "one"]
Grouping = Literal["resolution", "layer", "pq"]

PIXEL_GAIN = 4.0
"""Pixels, whose spread is a fraction of 1, enter beside features of unit variance."""

GLANCE = 4
"""Height and width of the thumbnail that every token starts from, px."""


@dataclass(frozen=True, kw_only=True)
class TokenArchitecture(TrunkSizes):
    """Sizes of a token network.

    Attributes:
        num_ws, w_dim: of the generator, L and D.
        channels: (O, I) of the generator's 3x3 layers, all of them (`kernel_channels`).
        kind: always "refine".
        stages: "two" sees a picture and what its first reconstruction lacks (6 channels) and writes
            tokens alone; "one" sees the picture and writes codes as e4e does, and tokens.
        factorization, rank, layers: see `models.stylegan2.tokens`; no layers stand for all.
        grouping: which token sets attend to each other: "resolution" (those of layers that read
            one map), "layer" (P and Q of one layer), "pq" (as resolution, P and Q apart).
        token_width: d. A multiple of 4 and of `heads`.
        heads, feed_forward, depth: of the transformer blocks.
        iterations: passes, each with a writer of its own and one trunk for all; 1 in the one-stage
            form.
        input_size, width, units, stem_stride: of the trunk, see `TrunkSizes`.
        head_width: channels inside the style heads of the one-stage form.
    """

    num_ws: int
    w_dim: int
    channels: tuple[tuple[int, int], ...]
    kind: Literal["refine"] = "refine"
    stages: Stages = "two"
    factorization: Factorization = "shared"
    rank: int = 4
    layers: tuple[int, ...] = ()
    grouping: Grouping = "resolution"
    token_width: int = 512
    heads: int = 4
    feed_forward: int = 1024
    depth: int = 1
    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = tuple((int(o), int(i)) for o, i in self.channels)
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        for name, known in (
            ("kind", ("refine",)),
            ("stages", ("two", "one")),
            ("grouping", ("resolution", "layer", "pq")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}"
                )
        if self.heads < 1 or self.token_width < 1 or self.token_width % math.lcm(4, self.heads):
            raise ConfigError(
                f"token_width: expected a multiple of 4 and of heads ({self.heads}), "
                f"found {self.token_width}"
            )
        for name in ("feed_forward", "depth", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.stages == "one" and self.iterations > 1:
            raise ConfigError(
                f"iterations: {self.iterations} passes look at a reconstruction, which the "
                'one-stage form does not see; leave it at 1 or choose stages = "two"'
            )
        if len(channels) != self.num_ws - 1:
            raise ConfigError(
                f"channels: a generator with {self.num_ws} rows of w+ has {self.num_ws - 1} 3x3 "
                f"layers, found {len(channels)}"
            )
        token_layouts(channels, self.layers, self.factorization, self.rank)  # refuses bad settings
        self.trunk()

    def trunk(self) -> EncoderArchitecture:
        """Sizes of the trunk, as an e4e encoder's."""
        return EncoderArchitecture(
            num_ws=self.num_ws,
            w_dim=self.w_dim,
            in_channels=6 if self.stages == "two" else 3,
            **self.trunk_sizes(),
        )

    @classmethod
    def tiny(cls, generator: Generator, **changes: Any) -> "TokenArchitecture":
        """The smallest example for a generator."""
        sizes = {**cls.tiny_sizes(generator), "channels": tuple(kernel_channels(generator))}
        sizes |= {"rank": 2, "token_width": 16, "heads": 2, "feed_forward": 16}
        return cls(**{**sizes, **changes})


@dataclass(frozen=True, kw_only=True)
class TokenSets:
    """What some passes have written.

    Attributes:
        passes: how many.
        states: of the tokens of each group, as its blocks left them.
        p, q: the tokens, for each refined layer in order.
    """

    passes: int
    states: list[Float[Tensor, "N G T d"]]
    p: list[Float[Tensor, "N T _"]]
    q: list[Float[Tensor, "N T _"]]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What a token network writes for N pictures.

    Attributes:
        residual: by index of the 3x3 layer.
        sets: the tokens that it is made of, for the next pass.
        w, deltas: codes of the one-stage form relative to `latent_avg`, as e4e splits them.
    """

    residual: Mapping[int, LowRank]
    sets: TokenSets
    w: Float[Tensor, "N D"] | None = None
    deltas: Float[Tensor, "N S D"] | None = None

    def offsets(self) -> Float[Tensor, "N L D"]:
        """Codes of the one-stage form relative to `latent_avg`: w, and on further rows w + delta.

        Raises:
            ValueError: it was written by a two-stage network.
        """
        if self.w is None or self.deltas is None:
            raise ValueError("a refinement of the two-stage form has no codes of its own")
        return self.w[:, None] + F.pad(self.deltas, (0, 0, 1, 0))


class TokenNetwork(nn.Module):
    """Picture (and its reconstruction so far) to token sets (and codes).

    Attributes:
        token_gain: factor of every residual; the one-stage training raises it from a small value,
            so that the codes learn first. 1 in use.
    """

    def __init__(self, architecture: TokenArchitecture) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self.trunk = Encoder4Editing(arch.trunk())
        if arch.stages == "two":
            self.trunk.styles = nn.ModuleList()  # the codes are the first stage's
        self._norms = keep_apart(self.trunk, arch.iterations)
        self.layouts = token_layouts(arch.channels, arch.layers, arch.factorization, arch.rank)
        self.token_gain = 1.0
        self.writers = nn.ModuleList(
            TokenWriter(arch, self.layouts, is_first=k == 0) for k in range(arch.iterations)
        )
        self.gains = nn.ParameterList(
            nn.Parameter(torch.ones(layout.out_channels)) for layout in self.layouts.values()
        )

    def forward(
        self,
        pictures: Float[Tensor, "N 3 H W"],
        reconstructions: Float[Tensor, "N 3 H W"] | None = None,
        before: Refinement | None = None,
    ) -> Refinement:
        """Token sets of pictures in [-1, 1] of any size, after one pass more.

        Args:
            reconstructions: what the first stage, and the passes before, made of them; in the
                two-stage form only.
            before: what those passes wrote; None for the first one.

        Raises:
            ValueError: reconstructions are missing, or given to the one-stage form; or all passes
                are over.
        """
        is_two = self.architecture.stages == "two"
        if is_two != (reconstructions is not None):
            raise ValueError(
                f"token network of {self.architecture.stages} stage(s): expected "
                f"{'pictures and their reconstructions' if is_two else 'pictures alone'}"
            )
        passes = before.sets.passes if before else 0
        if passes >= len(self.writers):
            raise ValueError(f"token network: all of its {passes} passes are over")
        seen = pictures
        if reconstructions is not None:
            seen = torch.cat([pictures, pictures - reconstructions], 1)
        for norm in self._norms:
            norm.used = passes
        maps = self.trunk.pyramid(
            seen.contiguous(memory_format=torch.channels_last), self.architecture.num_ws
        )
        codes = (None, None) if is_two else self.trunk.split_maps(maps)
        with torch.autocast(pictures.device.type, enabled=False):  # residuals stay float32
            maps = [m.float() for m in maps]
            sets = self.writers[passes](
                maps, self.trunk.resized(seen).float(), before.sets if before else None
            )
            return Refinement(residual=self._residual(sets), sets=sets, w=codes[0], deltas=codes[1])

    def _residual(self, sets: TokenSets) -> dict[int, LowRank]:
        scale = self.token_gain / math.sqrt(self.architecture.rank)
        return {
            layer: layout.low_rank(sets.p[k], sets.q[k], self.gains[k] * scale)
            for k, (layer, layout) in enumerate(self.layouts.items())
        }

    def begin_as(self, other: "TokenNetwork") -> None:
        """Take the weights of a network of the same sizes and as many passes or fewer. The writers
        that it lacks begin as its last one, with silent heads.

        Raises:
            ValueError: other sizes, or more passes.
        """
        mine, its = self.architecture, other.architecture
        may_differ = {"iterations"} if its.iterations <= mine.iterations else set()
        if mine.stages == "two":
            may_differ.add("head_width")  # it has no style heads
        if different := differing_sizes(its, mine, may_differ):
            raise ValueError(different)
        missing, unexpected = self.load_state_dict(other.state_dict(), strict=False)
        later = tuple(f"writers.{k}." for k in range(its.iterations, mine.iterations))
        assert not unexpected, unexpected
        assert all(name.startswith(later) or ".later." in name for name in missing), missing
        for norm in self._norms:
            norm.copy_last(its.iterations)
        for writer in self.writers[its.iterations :]:
            writer.load_state_dict(other.writers[-1].state_dict())
            writer.silence()  # type: ignore[operator]


class TokenWriter(nn.Module):
    """One pass: from what the trunk saw to the tokens, or to what is to be added to them.

    A fresh one changes no kernel. The first one's heads of Q start at zero, those of P do not, or
    neither would ever learn; a later one adds to both, and all of its heads start at zero.

    Args:
        layouts: by index of the refined layer.
        is_first: whether no pass comes before.
    """

    def __init__(
        self, architecture: TokenArchitecture, layouts: Mapping[int, TokenLayout], is_first: bool
    ) -> None:
        super().__init__()
        arch, width = architecture, architecture.token_width
        index = {layer: k for k, layer in enumerate(layouts)}
        count = next(iter(layouts.values())).count
        self.layer_embedding = nn.Parameter(torch.randn(len(layouts), width) * 0.5)
        self.type_embedding = nn.Parameter(torch.randn(2, width) * 0.5)
        self.plan = _groups(list(layouts), arch.grouping)
        self.groups = nn.ModuleList(
            TokenGroup(arch, len(members), count, 8 * arch.width) for members in self.plan
        )
        self._at = [
            ([index[layer] for layer, _ in members], [side for _, side in members])
            for members in self.plan
        ]
        self.heads_p, self.heads_q = nn.ModuleList(), nn.ModuleList()
        for layout in layouts.values():
            self.heads_p.append(nn.Linear(width, layout.p_width))
            self.heads_q.append(nn.Linear(width, layout.q_width))
        self.silence(("q",) if is_first else ("p", "q"))

    def silence(self, sides: Sequence[Literal["p", "q"]] = ("p", "q")) -> None:
        """Let the heads of these sides say zero, whatever the tokens are."""
        with torch.no_grad():
            for side in sides:
                for parameter in getattr(self, f"heads_{side}").parameters():
                    parameter.zero_()

    def forward(
        self,
        maps: list[Float[Tensor, "N C h w"]],
        seen: Float[Tensor, "N I H W"],
        before: TokenSets | None = None,
    ) -> TokenSets:
        """Tokens from the map that each row reads, from what the trunk saw, and from the passes
        before: their states go on, and what this pass writes is added to their tokens."""
        sets: list[dict[int, Tensor]] = [{}, {}]
        states = []
        for which, (members, group, (at, sides)) in enumerate(
            zip(self.plan, self.groups, self._at, strict=True)
        ):
            embedding = self.layer_embedding[at] + self.type_embedding[sides]
            start = before.states[which] if before else None
            found = group(maps[members[0][0]], seen, embedding, start)
            states.append(found)
            for column, (k, side) in enumerate(zip(at, sides, strict=True)):
                sets[side][k] = found[:, column]
        p = [head(sets[0][k]) for k, head in enumerate(self.heads_p)]
        q = [head(sets[1][k]) for k, head in enumerate(self.heads_q)]
        if before:
            p = [old + new for old, new in zip(before.p, p, strict=True)]
            q = [old + new for old, new in zip(before.q, q, strict=True)]
        return TokenSets(passes=1 + (before.passes if before else 0), states=states, p=p, q=q)


class TokenGroup(nn.Module):
    """Token sets that attend to one map and to each other.

    Two short ways lead around the trunk, whose features know what an encoder needs and little of
    what it missed: pixels stand beside the map's features, and every token starts from a thumbnail
    of the error (of the picture, in the one-stage form).

    Args:
        num_sets: G.
        count: T.
        in_channels: C of the map.
    """

    def __init__(
        self, architecture: TokenArchitecture, num_sets: int, count: int, in_channels: int
    ) -> None:
        super().__init__()
        arch = architecture
        self.queries = nn.Parameter(torch.randn(num_sets, count, arch.token_width) * 0.5)
        self.memory_norm = nn.LayerNorm(in_channels)
        pixels = arch.trunk().in_channels
        self.memory = nn.Linear(in_channels + pixels, arch.token_width)
        self.glance = nn.Linear(3 * GLANCE**2, num_sets * count * arch.token_width)
        self.blocks = nn.ModuleList(
            TokenBlock(arch.token_width, arch.heads, arch.feed_forward) for _ in range(arch.depth)
        )
        self.norm = nn.LayerNorm(arch.token_width)

    def forward(
        self,
        feature_map: Float[Tensor, "N C h w"],
        seen: Float[Tensor, "N I H W"],
        embedding: Float[Tensor, "G d"],
        start: Float[Tensor, "N G T d"] | None = None,
    ) -> Float[Tensor, "N G T d"]:
        """The tokens' states; `start` are those of the pass before."""
        h, w = feature_map.shape[2:]
        features = self.memory_norm(feature_map.flatten(2).transpose(1, 2))
        pixels = PIXEL_GAIN * F.adaptive_avg_pool2d(seen, (h, w)).flatten(2).transpose(1, 2)
        memory = self.memory(torch.cat([features, pixels], 2))
        memory = memory + sinusoids(h, w, memory.shape[2], memory)
        last = PIXEL_GAIN * F.adaptive_avg_pool2d(seen[:, -3:], GLANCE).flatten(1)
        x = self.queries + embedding[:, None] + self.glance(last).unflatten(1, self.queries.shape)
        x = (x if start is None else x + start).flatten(1, 2)
        for block in self.blocks:
            x = block(x, memory)
        return self.norm(x).unflatten(1, self.queries.shape[:2])


class TokenBlock(nn.Module):
    """Cross-attention to the map, self-attention, feed-forward; normalised before each (pre-norm).

    The map comes first: where self-attention led, the tokens of a single block would exchange
    nothing but learned constants.
    """

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.cross = TokenAttention(width, heads)
        self.self_ = TokenAttention(width, heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward), nn.GELU(), nn.Linear(feed_forward, width)
        )

    def forward(
        self, x: Float[Tensor, "N S d"], memory: Float[Tensor, "N M d"]
    ) -> Float[Tensor, "N S d"]:
        x = x + self.cross(self.norms[0](x), memory)
        seen = self.norms[1](x)
        x = x + self.self_(seen, seen)
        return x + self.feed_forward(self.norms[2](x))


class TokenAttention(nn.Module):
    """Multi-head attention without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(
        self, x: Float[Tensor, "N S d"], memory: Float[Tensor, "N M d"]
    ) -> Float[Tensor, "N S d"]:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(memory).chunk(2, 2)
        mixed = F.scaled_dot_product_attention(split(self.query(x)), split(key), split(value))
        return self.out(mixed.transpose(1, 2).flatten(2))


def sinusoids(h: int, w: int, width: int, like: Tensor) -> Float[Tensor, "M d"]:
    """Sines and cosines of the row (first half of d) and of the column, of growing wavelengths.

    Wavelengths run from 2 pi to 2 pi 10,000 places (arXiv 1706.03762, section 3.5), as DETR uses
    them in two dimensions.
    """
    count = width // 4
    rates = 10_000.0 ** (-torch.arange(count, device=like.device, dtype=like.dtype) / count)

    def axis(size: int) -> Tensor:
        angles = torch.arange(size, device=like.device, dtype=like.dtype)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)  # [size d/2]

    rows, columns = axis(h)[:, None].expand(h, w, -1), axis(w)[None].expand(h, w, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def _groups(layers: list[int], grouping: Grouping) -> list[list[tuple[int, int]]]:
    """Token sets as (layer, 0 for P or 1 for Q), those together that attend to each other."""

    def key(layer: int, side: int) -> tuple[int, int]:
        # Rows of one map; the map of a row is the pyramid's (`PyramidEncoder.pyramid`).
        band = 0 if layer < COARSE_ROWS else 1 if layer < MIDDLE_ROWS else 2
        return (layer if grouping == "layer" else band, side if grouping == "pq" else 0)

    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for layer in layers:
        for side in (0, 1):
            found.setdefault(key(layer, side), []).append((layer, side))
    return list(found.values())


TOKEN_NETWORKS: Kinds = {"refine": (TokenArchitecture, TokenNetwork)}
"""For `load_network`."""

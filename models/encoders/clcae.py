"""CLCAE's encoder: w, the blocks that refine it to w+, and the map F (arXiv 2211.11448).

An IR-SE trunk with a pyramid, on pictures minus the picture of the mean code. Head 0 gives the base
b (w = b + latent_avg), the other heads one row each. A block per row lets b attend to its row and
gives that row of w+; one more lets the finest map of the pyramid attend to b, and two convolutions
turn it into f, which replaces the generator's activation after the fifth 3x3 layer.

As published every one of these attentions has a single key. A softmax over one key is 1: queries
and keys never act, and the attention is the linear map `out_proj(v_proj(.))` of the key, exactly.
`attention` chooses how that is held, or gives the blocks all rows as keys, where it is real.

Legend: N batch, L num_ws, D w_dim, T query tokens, K key tokens, E embedding, C H W image or map.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.checkpoint import (
    Kinds,
    check_size,
    differing_sizes,
    filled,
    load_network,
    read_official,
)
from models.encoders.contrastive import centred
from models.encoders.psp import PyramidEncoder, TrunkSizes
from models.errors import AssetError
from models.files import file_sha256
from models.stylegan2.generator import Generator

FEATURE_LAYER = 5
"""Of `Generator.synthesis`: the second convolution at 16x16."""
FEATURE_SIZE = Generator.conv_resolution(FEATURE_LAYER - 1)


@dataclass(frozen=True, kw_only=True)
class ClcaeArchitecture(TrunkSizes):
    """Sizes of the network. The defaults are the official ones but for `num_ws`.

    Attributes:
        num_ws: rows of w+, L.
        w_dim: dimension of w, D.
        input_size, width, units, head_width, stem_stride: see `TrunkSizes`.
        hidden: width inside the feed-forward part of a row's block.
        feature_hidden: the same of the block of the map.
        feature_width: channels between the two convolutions that make f.
        feature_channels: channels of f, the generator's at 16x16.
        feature_slope: of the leaky ReLU after the last convolution. 0.01 as published, which keeps
            f from the negative values that the generator's activations have (slope 0.2).
        attention: "one" holds the official parameters, queries and keys without effect among them;
            "folded" the one matrix that they amount to; "all" lets b attend to all rows, and the
            map to all rows of w+.
        form: "norm" as released, w+_i = latent_avg + b + LN(..), whose last gain starts at 0 here;
            "residual" as the paper's formula, w+_i = w + attention(..), with a feed-forward part
            that starts at 0. Its folded rows start as e4e's: w+_i = w + delta_i.
        num_heads: of the attention where it is real.
        is_centred: whether the picture of the mean code is taken off the input, as published.
    """

    num_ws: int
    w_dim: int = 512
    kind: Literal["clcae"] = "clcae"
    hidden: int = 1024
    feature_hidden: int = 1024
    feature_width: int = 512
    feature_channels: int = 512
    feature_slope: float = 0.01
    attention: Literal["one", "folded", "all"] = "one"
    form: Literal["norm", "residual"] = "norm"
    num_heads: int = 4
    is_centred: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ("one", "folded", "all"):
            raise ValueError(
                f'clcae attention: expected "one", "folded" or "all", found {self.attention!r}'
            )
        if self.form not in ("norm", "residual"):
            raise ValueError(f'clcae form: expected "norm" or "residual", found {self.form!r}')
        if self.num_ws <= FEATURE_LAYER:
            raise ValueError(
                f"clcae num_ws: expected more than {FEATURE_LAYER} (a generator of 16 px or more), "
                f"found {self.num_ws}"
            )
        if self.attention == "one" and self.w_dim != self.channels:
            raise ValueError(
                'clcae attention "one": the official parameters need w_dim = 8 x width, found '
                f'{self.w_dim} and {self.channels}; choose "folded"'
            )
        if self.input_size // 4 > 4 * FEATURE_SIZE:
            raise ValueError(
                f"clcae input_size: expected at most {16 * FEATURE_SIZE}, found {self.input_size}"
            )

    @property
    def in_channels(self) -> int:
        return 3

    @property
    def channels(self) -> int:
        """Of the trunk's last stage and of the pyramid."""
        return 8 * self.width

    @classmethod
    def tiny(cls, generator: Generator, **changes: Any) -> "ClcaeArchitecture":
        """The smallest example for a generator."""
        sizes = {
            **cls.tiny_sizes(generator),
            "hidden": 8,
            "feature_hidden": 8,
            "feature_width": 8,
            "feature_channels": generator.architecture.widths[FEATURE_SIZE],
            "attention": "all",
            "form": "residual",
        }
        return cls(**{**sizes, **changes})


class OneKeyAttention(nn.Module):
    """Multi-head attention to a single key with the official parameters; only the values act."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, query: Float[Tensor, "N T E"], keys: Float[Tensor, "N 1 E"]
    ) -> Float[Tensor, "N 1 E"]:
        dim = keys.shape[2]
        value = F.linear(keys, self.in_proj_weight[-dim:], self.in_proj_bias[-dim:])
        return self.out_proj(value)


class FoldedAttention(nn.Module):
    """The same map with its two matrices multiplied out."""

    def __init__(self, dim: int, key_dim: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(key_dim, dim)

    def forward(
        self, query: Float[Tensor, "N T E"], keys: Float[Tensor, "N 1 D"]
    ) -> Float[Tensor, "N 1 E"]:
        return self.out_proj(keys)


class Attention(nn.MultiheadAttention):
    """Attention to several keys."""

    def __init__(self, dim: int, key_dim: int, heads: int) -> None:
        super().__init__(dim, heads, kdim=key_dim, vdim=key_dim, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Float[Tensor, "N T E"], keys: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N T E"]:
        return super().forward(query, keys, keys, need_weights=False)[0]


class CrossBlock(nn.Module):
    """Attention and a feed-forward part, each with a residual.

    The norm form holds `norm1`, which the released class has and never calls.
    """

    def __init__(self, arch: ClcaeArchitecture, dim: int, hidden: int) -> None:
        super().__init__()
        self.form = arch.form
        if arch.attention == "one":
            self.multihead_attn: nn.Module = OneKeyAttention(dim)
        elif arch.attention == "folded":
            self.multihead_attn = FoldedAttention(dim, arch.w_dim)
        else:
            self.multihead_attn = Attention(dim, arch.w_dim, arch.num_heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        if self.form == "norm":
            self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        else:
            for layer in (self.multihead_attn.out_proj, self.linear2):
                assert isinstance(layer, nn.Linear)
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, query: Float[Tensor, "N T E"], keys: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N T E"]:
        x = query + self.multihead_attn(query, keys)
        if self.form == "norm":
            x = self.norm2(x)
            return self.norm3(x + self._feed_forward(x))
        return x + self._feed_forward(self.norm2(x))

    def _feed_forward(self, x: Float[Tensor, "N T E"]) -> Float[Tensor, "N T E"]:
        return self.linear2(F.relu(self.linear1(x)))


class FeatureHead(nn.Module):
    """Two convolutions from the finest map of the pyramid to f, strided where it is larger."""

    def __init__(self, arch: ClcaeArchitecture) -> None:
        super().__init__()
        size = arch.input_size // 4
        halvings = int(math.log2(size / FEATURE_SIZE))
        strides = [2 if index < halvings else 1 for index in range(2)]
        self.convs = nn.Sequential(
            nn.Conv2d(arch.channels, arch.feature_width, 3, strides[0], 1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(arch.feature_width, arch.feature_channels, 3, strides[1], 1),
            nn.LeakyReLU(arch.feature_slope),
        )

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C h w"]:
        if x.shape[2] < FEATURE_SIZE:  # pictures below 64 px
            x = F.interpolate(x, (FEATURE_SIZE, FEATURE_SIZE), mode="bilinear")
        return self.convs(x)


class ClcaeEncoder(PyramidEncoder):
    """Pictures to (w, w+, f) in one pass. Parameter names are the official ones."""

    def __init__(self, architecture: ClcaeArchitecture) -> None:
        arch = architecture
        super().__init__(arch)  # type: ignore[arg-type]
        self.architecture = arch
        self.styles_others = self.styles[1:]
        self.styles = self.styles[:1]
        self.cross_attention = nn.ModuleList(
            CrossBlock(arch, arch.w_dim, arch.hidden) for _ in range(arch.num_ws)
        )
        self.feature_cross_attention = CrossBlock(arch, arch.channels, arch.feature_hidden)
        self.content_layer = FeatureHead(arch)
        self._start_rows(arch)

    def forward(
        self,
        image: Float[Tensor, "N 3 H W"],
        average: Float[Tensor, "3 H W"],
        shift: Float[Tensor, "N D"] | None = None,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N L D"], Float[Tensor, "N C h w"]]:
        """b and the rows of w+, both relative to `latent_avg`, and f.

        Args:
            image: pictures in [-1, 1] of any size.
            average: the generator's picture of `latent_avg`, of the size of the pictures.
            shift: added to b before the blocks: the released code's way to edit with a direction.
        """
        arch: Any = self.architecture
        image = centred(self, image, average) if arch.is_centred else self.resized(image)
        maps = self.pyramid(image, arch.num_ws)
        base = self.styles[0](maps[0])
        if shift is not None:
            base = base + shift
        heads = zip(self.styles_others, maps[1:], strict=True)
        rows = torch.stack([base, *(head(x) for head, x in heads)], 1)
        with torch.autocast(image.device.type, enabled=False):  # codes stay float32
            w_plus = self._refined(base, rows)
        return base, w_plus, self._features(maps[-1], base, w_plus)

    def _refined(
        self, base: Float[Tensor, "N D"], rows: Float[Tensor, "N L D"]
    ) -> Float[Tensor, "N L D"]:
        query = base[:, None]
        found = []
        for index, block in enumerate(self.cross_attention):
            keys = rows if self._is_real else rows[:, index : index + 1]
            found.append(block(query, keys))
        refined = torch.cat(found, 1)
        return refined + query if self.architecture.form == "norm" else refined

    def _features(
        self, finest: Float[Tensor, "N C H W"], base: Tensor, w_plus: Tensor
    ) -> Float[Tensor, "N C h w"]:
        keys = w_plus if self._is_real else base[:, None]
        tokens = self.feature_cross_attention(finest.flatten(2).transpose(1, 2), keys)
        return self.content_layer(tokens.transpose(1, 2).reshape(finest.shape))

    @property
    def _is_real(self) -> bool:
        return self.architecture.attention == "all"

    def begin_as(self, other: "ClcaeEncoder") -> None:
        """Take the weights of an encoder of the same sizes.

        Raises:
            ValueError: other sizes.
        """
        if different := differing_sizes(other.architecture, self.architecture):
            raise ValueError(different)
        self.load_state_dict(other.state_dict())

    def _start_rows(self, arch: ClcaeArchitecture) -> None:
        """What the rows of w+ are before training: b (norm form, no offset), or e4e's b + delta."""
        for index, module in enumerate(self.cross_attention):
            assert isinstance(module, CrossBlock)
            if arch.form == "norm":
                nn.init.zeros_(module.norm3.weight)
            elif index and isinstance(module.multihead_attn, FoldedAttention):
                nn.init.eye_(module.multihead_attn.out_proj.weight)


CLCAE: Kinds = {"clcae": (ClcaeArchitecture, ClcaeEncoder)}
"""For `load_network`."""


def load_clcae(
    path: str | Path, num_ws: int, w_dim: int
) -> tuple[ClcaeEncoder, str, dict[str, Any]]:
    """Open an encoder for a generator with `num_ws` rows of `w_dim`.

    Args:
        path: ours (.safetensors with its .json card) or an official checkpoint (.pt).

    Returns:
        The encoder (eval mode, float32, no gradients, on the CPU), the file's sha256, and the card,
        empty for an official file.

    Raises:
        AssetError: missing, unreadable, damaged, or another layout; the message names what differs.
    """
    path = Path(path)
    if path.suffix == ".safetensors" or not path.is_file():
        encoder, sha256, card = load_network(path, CLCAE)
        check_size(path, encoder.architecture, num_ws, w_dim)
        return encoder, sha256, card
    _, state, _ = read_official(path)
    complaint = f"{path}: not an official CLCAE for a generator with {num_ws} rows of {w_dim}"
    architecture = ClcaeArchitecture(num_ws=num_ws)
    if w_dim != architecture.w_dim:
        raise AssetError(f"{complaint}: its codes have {architecture.w_dim} values")
    return filled(ClcaeEncoder, (architecture,), state, complaint), file_sha256(path), {}

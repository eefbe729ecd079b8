"""The StyleGAN2 generator: one forward pass, and the doors by which a picture comes through it.

Legend: N batch, L num_ws (rows of w+), D w_dim, I/O in/out channels, C H W image.
Parameter names and shapes are rosinality's, so the field's checkpoints load after a prefix strip.
Source: StyleGAN2 (arXiv 1912.04958), config f (skip generator), lr_mul 0.01 in the mapping network.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.errors import AssetError
from models.stylegan2.architecture import GeneratorArchitecture as GeneratorArchitecture
from models.stylegan2.layers import EqualLinear, PixelNorm
from models.stylegan2.modulated_conv import Form
from models.stylegan2.residual import Residual
from models.stylegan2.synthesis_layers import ConstantInput, ModulatedConv, StyledConv, ToRGB

CHUNK_BYTES = 32 << 20
"""On a CPU without a graph, activations beyond this size are computed a few samples at a time."""
LARGE_BATCH = 8
"""Layers of which fewer samples than this fit in CHUNK_BYTES count as large."""

Noise = Literal["const", "none", "random"] | Sequence[Tensor]
StyleShift = Mapping[int, Float[Tensor, "_ _"]]
"""What is added to the affines' outputs: [N I] or [1 I] by index in `Generator.layers()`."""


@dataclass(kw_only=True)
class _Part:
    """What flows through the synthesis layers, for all samples or for some."""

    x: Tensor
    image: Tensor | None
    styles: Sequence[Tensor]
    maps: Sequence[Tensor | None]
    features: Mapping[int, Tensor] | None
    residual: Residual | None

    def rows(self, rows: slice) -> "_Part":
        return _Part(
            x=self.x[rows],
            image=None if self.image is None else self.image[rows],
            styles=[s[rows] for s in self.styles],
            maps=[m if m is None or len(m) == 1 else m[rows] for m in self.maps],
            features=self.features and {k: f[rows] for k, f in self.features.items()},
            residual=self.residual and {k: r[rows] for k, r in self.residual.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What the 3x3 layers before `layer` make: their activations [N C h w] and image [N 3 h w]."""

    layer: int
    x: Tensor
    image: Tensor | None

    def __getitem__(self, rows: Tensor) -> "Begun":
        """Some rows, by a tensor of their numbers."""
        image = None if self.image is None else self.image[rows]
        return Begun(layer=self.layer, x=self.x[rows], image=image)


class Generator(nn.Module):
    """StyleGAN2: `mapping` draws w+, `synthesis` renders it, `styles` shows every affine's output.

    Attributes:
        resolution, num_ws, w_dim, z_dim, c_dim: see `GeneratorArchitecture`.
        latent_avg: [D], the mean of W, in the state as a buffer. NaN until it is known.
        compute_dtype: precision of the convolutions; parameters and the image stay in theirs.
        form: exact form of every modulated convolution ("auto" chooses by shape).
        provenance: where the weights came from; filled by `models.checkpoints`.
    """

    latent_avg: Tensor

    def __init__(self, architecture: GeneratorArchitecture) -> None:
        super().__init__()
        self.architecture = arch = architecture
        self.resolution, self.num_ws = arch.resolution, arch.num_ws
        self.w_dim, self.z_dim, self.c_dim = arch.w_dim, arch.z_dim, arch.c_dim
        self.compute_dtype: torch.dtype | None = None
        self.memory_format: torch.memory_format | None = None
        self.form: Form = "auto"
        self.provenance: dict[str, Any] = {}

        in_dim = arch.z_dim
        if arch.c_dim:
            self.embed = EqualLinear(arch.c_dim, arch.w_dim)
            in_dim += arch.w_dim
        layers: list[nn.Module] = [PixelNorm()]
        for index in range(arch.mapping_layers):
            layers.append(
                EqualLinear(
                    in_dim if index == 0 else arch.w_dim,
                    arch.w_dim,
                    lr_mul=arch.mapping_lr_mul,
                    is_activated=True,
                )
            )
        self.style = nn.Sequential(*layers)

        width = arch.widths
        self.input = ConstantInput(width[4])
        self.conv1 = StyledConv(width[4], width[4], arch.w_dim, up=False)
        self.to_rgb1 = ToRGB(width[4], arch.w_dim)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for res in sorted(width)[1:]:
            self.convs.append(StyledConv(width[res // 2], width[res], arch.w_dim, up=True))
            self.convs.append(StyledConv(width[res], width[res], arch.w_dim, up=False))
            self.to_rgbs.append(ToRGB(width[res], arch.w_dim))
        self.noises = nn.Module()
        for index in range(self.num_convs):
            res = self.conv_resolution(index)
            self.noises.register_buffer(f"noise_{index}", torch.randn(1, 1, res, res))
        self.register_buffer("latent_avg", torch.full((arch.w_dim,), float("nan")))

    # ------------------------------------------------------------------ shape of the network

    @property
    def num_convs(self) -> int:
        """Number of 3x3 modulated convolutions, L - 1."""
        return self.num_ws - 1

    def conv(self, index: int) -> StyledConv:
        """The 3x3 layer `index`: 0 is `conv1`, i + 1 is `convs.i`. Its row of w+ is `index`."""
        return self.conv1 if index == 0 else cast(StyledConv, self.convs[index - 1])

    @staticmethod
    def conv_resolution(index: int) -> int:
        """Output size of the 3x3 layer `index`, px."""
        return 4 * 2 ** ((index + 1) // 2)

    def layers(self) -> list[tuple[str, ModulatedConv, int]]:
        """Every modulated layer in order, as (name, layer, row of w+), ToRGB included.

        The ToRGB of a block shares the row of the next block's first convolution.
        """
        found = [("conv1", self.conv1.conv, 0), ("to_rgb1", self.to_rgb1.conv, 1)]
        for block, to_rgb in enumerate(self.to_rgbs):
            for index in (2 * block, 2 * block + 1):
                found.append((f"convs.{index}", self.conv(index + 1).conv, index + 1))
            found.append((f"to_rgbs.{block}", cast(ToRGB, to_rgb).conv, 2 * block + 3))
        return found

    # ------------------------------------------------------------------ the public face

    def mapping(
        self,
        z: Float[Tensor, "N Z"],
        c: Float[Tensor, "N K"] | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Float[Tensor, "N L D"]:
        """Map z (and a condition) to w, repeated to every row, pulled towards `latent_avg`.

        Args:
            z: standard normal samples.
            c: condition vectors (one-hot labels); required when `c_dim > 0`.
            truncation_psi: 1 keeps w, 0 gives `latent_avg`.
            truncation_cutoff: rows before it are truncated; None truncates all.
        """
        x = self.style[0](z)
        if self.c_dim:
            if c is None:
                raise ValueError(
                    f"this generator is conditional: mapping needs c of shape [N {self.c_dim}]"
                )
            embedded = self.embed(c)
            # NVIDIA normalises z and the embedding each, then concatenates.
            x = torch.cat([x, self.style[0](embedded)], dim=1)
        for layer in list(self.style)[1:]:
            x = layer(x)
        w_plus = x[:, None].repeat(1, self.num_ws, 1)
        if truncation_psi == 1.0:
            return w_plus
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        pulled = self.latent_avg.lerp(w_plus[:, :cutoff], truncation_psi)
        return torch.cat([pulled, w_plus[:, cutoff:]], dim=1)

    def styles(self, w_plus: Float[Tensor, "N L D"]) -> list[Float[Tensor, "N I"]]:
        """Every affine's output in layer order (`layers`), ToRGB included, before any gain."""
        return [layer.modulation(w_plus[:, row]) for _, layer, row in self.layers()]

    def synthesis(
        self,
        w_plus: Float[Tensor, "N L D"],
        noise: Noise = "const",
        features: Mapping[int, Float[Tensor, "N _ _ _"]] | None = None,
        residual: Residual | None = None,
        style_shift: StyleShift | None = None,
        begun: Begun | None = None,
    ) -> Float[Tensor, "N 3 H W"]:
        """Render codes. The result is in about [-1, 1] for a trained generator.

        Args:
            w_plus: one w per layer.
            noise: "const" uses the stored maps, "none" no noise, "random" fresh noise from torch's
                generator, or one tensor [N or 1, 1, h, w] for each 3x3 convolution.
            features: activations that replace the output of a 3x3 layer, keyed 1..L-1 in layer
                order (5 is CLCAE's F: the second convolution at 16x16). The ToRGB of that
                resolution still reads the activation that was replaced, as CLCAE does.
            residual: low-rank kernel additions by index of the 3x3 layer (0 is `conv1`).
            style_shift: added to the styles of some layers: an edit in style space.
            begun: what `begin` made of the same inputs; its layers are not run again.
        """
        part, has_graph = self._part(w_plus, noise, features, residual, style_shift, begun)
        first = 0 if begun is None else begun.layer
        if has_graph or part.x.is_cuda or len(w_plus) == 1 or self.form == "grouped":
            return self._run(part, first, self.num_convs)
        # Large activations: a few samples at a time from here on. The result is the same, the
        # memory is that of one sample, and it is still in the cache when it is used again.
        split = max(self._first_large_layer(w_plus.dtype), first)
        self._run(part, first, split)
        sizes = [self._chunk(index, w_plus.dtype) for index in range(split, self.num_convs)]
        size = min(sizes, default=len(w_plus))
        if size >= len(w_plus):
            return self._run(part, split, self.num_convs)
        chunks = range(0, len(w_plus), size)
        images = [
            self._run(part.rows(slice(at, at + size)), split, self.num_convs) for at in chunks
        ]
        return torch.cat(images)

    forward = synthesis

    def begin(
        self,
        w_plus: Float[Tensor, "N L D"],
        layer: int,
        noise: Noise = "const",
        features: Mapping[int, Float[Tensor, "N _ _ _"]] | None = None,
        residual: Residual | None = None,
        style_shift: StyleShift | None = None,
    ) -> Begun:
        """The 3x3 layers before `layer` (0..L-1) alone, with the inputs of `synthesis`."""
        if not 0 <= layer <= self.num_convs:
            raise ValueError(f"begin: expected a layer in 0..{self.num_convs}, found {layer}")
        part, _ = self._part(w_plus, noise, features, residual, style_shift, None)
        self._run(part, 0, layer)
        return Begun(layer=layer, x=part.x, image=part.image)

    def _part(
        self,
        w_plus: Tensor,
        noise: Noise,
        features: Mapping[int, Tensor] | None,
        residual: Residual | None,
        style_shift: StyleShift | None,
        begun: Begun | None,
    ) -> tuple["_Part", bool]:
        """What flows into the first layer to run, and whether a graph will be built."""
        self._check_inputs(w_plus, features, residual)
        self._check_shift(w_plus, style_shift or {})
        maps = self._noise_maps(noise, w_plus)
        styles = self.styles(w_plus)
        for index, shift in (style_shift or {}).items():
            styles[index] = styles[index] + shift.to(styles[index])
        dtype = self.compute_dtype or w_plus.dtype
        x = self.input.input.expand(w_plus.shape[0], -1, -1, -1) if begun is None else begun.x
        x = x.to(dtype)
        x = x.contiguous(memory_format=self._memory_format(styles, maps, features, residual))
        part = _Part(
            x=x,
            image=None if begun is None else begun.image,
            styles=styles,
            maps=maps,
            features=features,
            residual=residual,
        )
        has_graph = torch.is_grad_enabled() and any(
            t.requires_grad for t in self._graph_inputs(styles, maps, features, residual)
        )
        return part, has_graph

    def activations(
        self,
        w_plus: Float[Tensor, "N L D"],
        layer: int,
        noise: Noise = "const",
        style_shift: StyleShift | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """The output of the 3x3 layer `layer` (1..L-1, as in `features`)."""
        if not 1 <= layer <= self.num_convs:
            raise ValueError(f"activations: expected a layer in 1..{self.num_convs}, found {layer}")
        return self.begin(w_plus, layer, noise, style_shift=style_shift).x

    # ------------------------------------------------------------------ inside

    def _run(self, part: "_Part", first: int, stop: int) -> Tensor:
        """The 3x3 layers first..stop-1 with their ToRGBs; `part` holds what flows between them."""
        clamp = self.architecture.conv_clamp
        for index in range(first, stop):
            # Styles run conv1, rgb1, then (conv, conv, rgb) a block.
            at = 0 if index == 0 else 2 + 3 * ((index - 1) // 2) + (index - 1) % 2
            part.x = self.conv(index)(
                part.x,
                part.styles[at],
                part.maps[index],
                clamp=clamp,
                residual=part.residual.get(index) if part.residual else None,
                form=self.form,
            )
            if index % 2 == 0:
                to_rgb = self.to_rgb1 if index == 0 else self.to_rgbs[index // 2 - 1]
                style = part.styles[at + 1]
                part.image = to_rgb(part.x, style, part.image, clamp=clamp, form=self.form)
            if part.features is not None and index + 1 in part.features:
                part.x = part.features[index + 1].to(part.x.dtype)
        return part.image  # type: ignore[return-value]

    def _chunk(self, index: int, dtype: torch.dtype) -> int:
        """Samples whose activations after layer `index` fit in CHUNK_BYTES together, at least 1."""
        size = self.conv_resolution(index) ** 2 * self.conv(index).conv.weight.shape[1]
        return max(CHUNK_BYTES // (size * dtype.itemsize), 1)

    def _first_large_layer(self, dtype: torch.dtype) -> int:
        """The first layer (of an even number, a whole block) that runs on few samples at a time."""
        for index in range(1, self.num_convs, 2):
            if self._chunk(index, dtype) < LARGE_BATCH:
                return index
        return self.num_convs

    def _graph_inputs(
        self,
        styles: Sequence[Tensor],
        maps: Sequence[Tensor | None],
        features: Mapping[int, Tensor] | None,
        residual: Residual | None,
    ) -> list[Tensor]:
        found = [*styles, *(m for m in maps if m is not None), *(features or {}).values()]
        for low_rank in (residual or {}).values():
            found += [low_rank.u, low_rank.v]
        return [*found, self.input.input, self.conv1.conv.weight]

    def _memory_format(self, *doors: Any) -> torch.memory_format:
        """Channels-last, except for optimisation through a frozen generator on a CPU.

        Depthwise filters and convolutions are faster channels-last, but a folded kernel per sample
        with a graph runs as one grouped convolution, which wants contiguous samples.
        """
        if self.memory_format is not None:
            return self.memory_format
        if self.form == "grouped":
            return torch.contiguous_format
        inputs = self._graph_inputs(*doors)
        is_frozen = not self.conv1.conv.weight.requires_grad
        has_graph = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        is_folding = has_graph and is_frozen and not inputs[0].is_cuda
        return torch.contiguous_format if is_folding else torch.channels_last

    def _noise_maps(self, noise: Noise, w_plus: Tensor) -> list[Tensor | None]:
        if isinstance(noise, str):
            if noise == "none":
                return [None] * self.num_convs
            if noise == "const":
                return [getattr(self.noises, f"noise_{i}") for i in range(self.num_convs)]
            if noise == "random":
                # Follow the learned input's shape, so that a non-square input works too.
                h, w = self.input.input.shape[2:]
                sizes = [self.conv_resolution(i) // 4 for i in range(self.num_convs)]
                n, like = w_plus.shape[0], {"dtype": w_plus.dtype, "device": w_plus.device}
                return [torch.randn(n, 1, h * s, w * s, **like) for s in sizes]
            raise ValueError(
                f'noise: expected "const", "none", "random" or tensors, found {noise!r}'
            )
        if len(noise) != self.num_convs:
            raise ValueError(f"noise: expected {self.num_convs} maps, found {len(noise)}")
        return list(noise)

    def _check_inputs(
        self, w_plus: Tensor, features: Mapping[int, Tensor] | None, residual: Residual | None
    ) -> None:
        if w_plus.ndim != 3 or w_plus.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(
                f"w_plus: expected [N {self.num_ws} {self.w_dim}] for this {self.resolution} px "
                f"generator, found {list(w_plus.shape)}"
            )
        for layer in features or {}:
            if not 1 <= layer <= self.num_convs:
                raise ValueError(f"features: expected layers in 1..{self.num_convs}, found {layer}")
        for index, part in (residual or {}).items():
            if not 0 <= index < self.num_convs:
                raise ValueError(
                    f"residual: expected layers in 0..{self.num_convs - 1}, found {index}"
                )
            _, o, i, k, _ = self.conv(index).conv.weight.shape
            want = ([w_plus.shape[0], o], [w_plus.shape[0], i, k, k])
            have = (list(part.u.shape[:2]), [part.v.shape[0], *part.v.shape[2:]])
            if want != have:
                raise ValueError(
                    f"residual of layer {index}: expected u [N O r] and v [N r I k k] with [N O], "
                    f"[N I k k] = {want}, found {have}: was it made for another generator?"
                )

    def _check_shift(self, w_plus: Tensor, style_shift: StyleShift) -> None:
        layers = self.layers()
        for index, shift in style_shift.items():
            if not 0 <= index < len(layers):
                raise ValueError(
                    f"style_shift: expected layers in 0..{len(layers) - 1}, found {index}"
                )
            name, layer, _ = layers[index]
            n, i = w_plus.shape[0], layer.weight.shape[2]
            if shift.ndim != 2 or shift.shape[0] not in (1, n) or shift.shape[1] != i:
                raise ValueError(
                    f"style_shift of layer {index} ({name}): expected [{n} {i}] or [1 {i}], found "
                    f"{list(shift.shape)}: was it made for another generator?"
                )


def weights_hash(module: nn.Module) -> str:
    """sha256 over parameters and buffers in name order: the identity stored with every latent."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def check_made_for(what: str, made_for: str, generator: Generator, remedy: str) -> None:
    """Refuse what was made for another generator: it means nothing to this one.

    Args:
        what: its name, for the message: "direction age".
        made_for: `weights_hash` of the generator it belongs to.
        remedy: what to do instead.

    Raises:
        AssetError: the hashes differ.
    """
    digest = weights_hash(generator)
    if made_for != digest:
        raise AssetError(
            f"{what}: it was made for generator {made_for[:12]}..., this one is {digest[:12]}...; "
            f"{remedy}"
        )

"""Pictures made to look as if drawn, painted or printed: labels for words that no file of pictures
comes with. A classic filter of image processing stands for each medium, with random settings.

Sources: colour dodge (pencil), extended differences of Gaussians (ink, charcoal; Winnemoeller et
al. 2012), Kuwahara's filter (paints; Kuwahara et al. 1976), line screens (engraving).

All randomness comes from torch's global generator on the CPU, which a checkpoint keeps.

Legend: N batch, H W image. Pictures here are in [0, 1].
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
Filter = Callable[[Tensor], Tensor]


def pencil(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Grey lines and hatched shade on paper: the picture divided by its blurred self."""
    grey = luma(x)
    lines = (grey / blurred(grey, _uniform(1.2, 2.5)).clamp(min=0.05)).clamp(max=1)
    lines = lines.pow(_uniform(2, 4))
    stripes = _stripes(x, _uniform(2.5, 4), _uniform(-1, 1))
    hatch = 1 - _uniform(0.3, 0.7) * stripes * (1 - blurred(grey, 1.0))
    return paper(lines * hatch, grain=0.05)


def charcoal(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Soft broad black with the grain of the paper, shade rubbed in."""
    grey = luma(x)
    lines = edges(grey, sigma=_uniform(1.0, 1.6), sharpness=_uniform(4, 8))
    tone = blurred(grey, 1.0).pow(_uniform(0.7, 1.3))
    grainy = (tone + 0.3 * blurred(torch.randn_like(tone), 0.6) * (1 - tone)).clamp(0, 1)
    return paper(lines * (0.15 + 0.85 * grainy), grain=0.03)


def ink(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Black lines and black shadows on white, nothing between."""
    grey = luma(x)
    lines = edges(grey, sigma=_uniform(0.6, 1.0), sharpness=_uniform(15, 40))
    shadow = torch.sigmoid((blurred(grey, 0.7) - _uniform(0.15, 0.3)) * 30)
    return (lines * shadow).expand(-1, 3, -1, -1)


def watercolour(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Washes: flat, light and uneven colour, darker where a wash ends, white paper around."""
    flat = kuwahara(kuwahara(x, 2), 2)
    flat = saturated(flat, _uniform(1.1, 1.7))
    rim = _gradient(luma(flat))
    pigment = 1 + _uniform(0.1, 0.25) * _field(x, 8) + 0.05 * torch.randn_like(x[:, :1])
    depth = (1 - flat) * _uniform(0.55, 0.85) * pigment + _uniform(0.5, 1.2) * rim
    return paper((1 - depth * _vignette(x)).clamp(0, 1), grain=0.03)


def oil(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Dabs of one colour each, lit from the side where the paint stands up."""
    flat = saturated(kuwahara(kuwahara(x, 2), int(_uniform(2, 4))), _uniform(1.0, 1.4))
    ridges = _stripes(x, _uniform(3, 5), _uniform(-1, 1)) - 0.5
    relief = ridges * blurred(torch.randn_like(ridges), 1.5) * _uniform(0.5, 1.0)
    return (flat + relief + _uniform(0.2, 0.5) * (flat - blurred(flat, 2.0))).clamp(0, 1)


def cartoon(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """A few flat tones between black outlines."""
    flat = kuwahara(kuwahara(x, 2), 1)
    grey, levels = luma(flat), round(_uniform(3, 6))
    toned = ((grey * levels).round() / levels).clamp(0.05, 1) / grey.clamp(min=0.05)
    lines = edges(luma(x), sigma=_uniform(0.7, 1.1), sharpness=_uniform(10, 25))
    return (saturated(flat * toned, _uniform(1.2, 2.0)) * lines).clamp(0, 1)


def poster(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Three or four loud colours in place of the tones, as pop art prints them."""
    levels = int(_uniform(3, 5))
    palette = torch.rand(len(x), levels, 3)
    order = (palette * palette.new_tensor(LUMA)).sum(2).argsort(1)
    palette = saturated(
        palette.gather(1, order[:, :, None].expand(-1, -1, 3)).permute(0, 2, 1)[..., None], 1.5
    )[..., 0].clamp(0, 1)
    tone = kuwahara(luma(x), 1)[:, 0]
    low, high = tone.flatten(1).quantile(0.05, 1), tone.flatten(1).quantile(0.95, 1)
    ranked = (tone - low[:, None, None]) / (high - low).clamp(min=0.1)[:, None, None]
    index = (ranked * levels).long().clamp(0, levels - 1)
    return palette.gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).reshape(x.shape)


def engraving(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Black lines of one direction, wide where the picture is dark."""
    wave = _stripes(x, _uniform(2.5, 3.5), _uniform(-1, 1))
    grey = luma(x)
    sharp = (grey + 2 * (grey - blurred(grey, 2.5)) + _uniform(0.1, 0.3)).clamp(0, 1.2)
    printed = torch.sigmoid((sharp - 0.8 * wave) * _uniform(5, 10))
    return paper(printed * edges(grey, 0.8, 10), grain=0.02)


def mosaic(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Square tiles of one colour each, as pixel art has them."""
    side = int(_uniform(3, 6))
    small = F.interpolate(x, size=(-(-x.shape[2] // side), -(-x.shape[3] // side)), mode="area")
    small = (saturated(small, _uniform(1.0, 1.5)) * 8).round() / 8
    large = F.interpolate(small, scale_factor=float(side), mode="nearest")
    return large[:, :, : x.shape[2], : x.shape[3]].clamp(0, 1)


FILTERS: Mapping[str, Filter] = {
    "pencil": pencil,
    "charcoal": charcoal,
    "ink": ink,
    "watercolour": watercolour,
    "oil": oil,
    "cartoon": cartoon,
    "poster": poster,
    "engraving": engraving,
    "mosaic": mosaic,
}
"""By medium (`tasks.training.assets.labels.MEDIA`)."""


def in_medium(images: Float[Tensor, "N 3 H W"], name: str) -> Float[Tensor, "N 3 H W"]:
    """Pictures in [-1, 1] through the filter of a medium; two by two they share its settings."""
    return torch.cat([FILTERS[name]((some + 1) / 2) for some in images.split(2)]) * 2 - 1


# ---------------------------------------------------------------------- what they are made of


def luma(x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 1 H W"]:
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def saturated(x: Float[Tensor, "N 3 H W"], factor: float) -> Float[Tensor, "N 3 H W"]:
    """Colours `factor` times as far from their grey."""
    grey = luma(x)
    return (grey + (x - grey) * factor).clamp(0, 1)


def blurred(x: Float[Tensor, "N C H W"], sigma: float) -> Float[Tensor, "N C H W"]:
    """Gaussian, edges reflected."""
    radius = max(1, round(2.5 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1.0) / sigma).square())
    taps = (taps / taps.sum()).to(x)
    c = x.shape[1]
    x = F.pad(x, [radius] * 4, mode="reflect")
    x = F.conv2d(x, taps[None, None, None].expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, taps[None, None, :, None].expand(c, 1, -1, 1), groups=c)


def edges(
    grey: Float[Tensor, "N 1 H W"], sigma: float, sharpness: float
) -> Float[Tensor, "N 1 H W"]:
    """Extended differences of Gaussians: 1 on paper, falling to 0 in dark lines."""
    wide = blurred(grey, 1.6 * sigma)
    difference = blurred(grey, sigma) - wide
    return (1 + torch.tanh(sharpness * (difference + 0.005).clamp(max=0) * 4)).clamp(0, 1)


def kuwahara(x: Float[Tensor, "N C H W"], radius: int) -> Float[Tensor, "N C H W"]:
    """The mean of the calmest of the four quarters around each place: flat areas, sharp borders."""
    size, r = radius + 1, radius
    n, c, h, w = x.shape
    padded = F.pad(x, [r] * 4, mode="reflect")
    mean = F.avg_pool2d(padded, size, 1)  # quarters that begin at each place
    spread = (F.avg_pool2d(padded.square(), size, 1) - mean.square()).sum(1, keepdim=True)
    corners = [(0, 0), (0, r), (r, 0), (r, r)]
    means = torch.stack([mean[:, :, i : i + h, j : j + w] for i, j in corners])
    spreads = torch.stack([spread[:, :, i : i + h, j : j + w] for i, j in corners])
    calmest = spreads.argmin(0, keepdim=True).expand(1, n, c, h, w)
    return means.gather(0, calmest)[0]


def paper(x: Float[Tensor, "N C H W"], grain: float) -> Float[Tensor, "N 3 H W"]:
    """On paper that is not quite white and not quite smooth."""
    tint = 1 - torch.rand(()) * x.new_tensor([0.03, 0.06, 0.15])[:, None, None]
    rough = 1 - grain * torch.rand_like(x[:, :1])
    return (x.expand(-1, 3, -1, -1) * tint * rough).clamp(0, 1)


def _gradient(grey: Float[Tensor, "N 1 H W"]) -> Float[Tensor, "N 1 H W"]:
    padded = F.pad(grey, [1] * 4, mode="reflect")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return (dx.square() + dy.square()).sqrt() / 2


def _stripes(x: Tensor, period: float, turn: float) -> Float[Tensor, "1 1 H W"]:
    """A wave in 0..1 across the picture, a little bent, `turn` quarter turns from upright."""
    rows, columns = torch.meshgrid(
        torch.arange(x.shape[2]).float(), torch.arange(x.shape[3]).float(), indexing="ij"
    )
    angle = torch.tensor(turn * torch.pi / 2)
    along = rows * angle.sin() + columns * angle.cos()
    bend = 1.5 * _field(x[:1], 4)[0, 0]
    wave = torch.sin(2 * torch.pi * (along + bend) / period)
    return ((wave + 1) / 2)[None, None].to(x)


def _field(x: Tensor, nodes: int) -> Float[Tensor, "N 1 H W"]:
    """Smooth noise of standard deviation about 1."""
    coarse = torch.randn(len(x), 1, nodes, nodes).to(x)
    return F.interpolate(coarse, size=x.shape[2:], mode="bicubic", align_corners=False)


def _vignette(x: Tensor) -> Float[Tensor, "N 1 H W"]:
    """1 inside, falling to 0 along a ragged rim: where the washes end."""
    h, w = x.shape[2:]
    rows = torch.linspace(-1, 1, h)[:, None].abs()
    columns = torch.linspace(-1, 1, w)[None].abs()
    rim = torch.maximum(rows, columns).to(x) + 0.08 * _field(x, 6)
    return torch.sigmoid((_uniform(0.85, 1.3) - rim) * 15)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))

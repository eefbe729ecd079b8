"""Modulated convolution in the cheaper of two exact forms, with the grouped twin as the truth.

Legend: N batch, I/O in/out channels, k kernel, H W input size, h w output size, r rank.

The layer computes, per sample n, `y_n = conv(x_n, d_n * K_n)` with `K_n = W * s_n + u_n v_n` and
`d_n,o = rsqrt(sum_ik K_n,oik^2 + 1e-8)` (StyleGAN2, equations 1-3; RefineStyle's residual between
the two). With `up`, the convolution is a transposed one of stride 2 (the caller filters it).

- `grouped`: build every K_n and run one grouped convolution. The reference; slow and large.
- `implicit`: `d * (conv(s * x, W) + u conv(x, v))`: one shared convolution for the whole batch. The
  norm of K_n comes from `s^2 Q + 2 sum_r u C + diag(u G u^T)`, with Q = sum_k W^2, C = W (s v)^T
  and G = v v^T. Of a residual that all samples share (`LowRank.expand`) the product dW = u v is
  built once: the norm is then `s^2 Q + 2 s sum_k W dW + sum_ik dW^2`.
- `folded`: scale the kernel and convolve sample by sample. Cheaper where the kernel is small and
  the activations are large. With a frozen kernel its backward pass computes no kernel gradient:
  the gradient of s is `sum_hw x * conv^T(d gy, W)`, the one of d is `sum_hw gy y / d`.
"""

from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.stylegan2.residual import LowRank

Form = Literal["auto", "grouped", "implicit", "folded"]
EPS = 1e-8


def modulated_conv2d(  # noqa: PLR0913 - the parts of one formula
    x: Float[Tensor, "N I H W"],
    weight: Float32[Tensor, "O I k k"] | Float[Tensor, "O I k k"],
    styles: Float[Tensor, "N I"],
    *,
    scale: float = 1.0,
    gain: float = 1.0,
    should_demodulate: bool = True,
    up: bool = False,
    residual: LowRank | None = None,
    form: Form = "auto",
    kept: "FrozenKernel | None" = None,
) -> Float[Tensor, "N O h w"]:
    """Convolve every sample with its own kernel (see the module's first lines).

    Args:
        x: activations; their dtype is the dtype of the convolution.
        weight: the shared kernel in its master precision.
        styles: per-sample input gains, in the kernel's precision.
        scale: the equalised-learning-rate gain 1/sqrt(I k k): multiplies kernel and residual.
        gain: multiplies the result (sqrt(2) of the following LeakyReLU, which commutes with it).
        should_demodulate: normalise each output channel's kernel (False in ToRGB).
        up: transposed convolution of stride 2 without padding: h = 2H + k - 2.
        residual: a per-sample low-rank addition, in the scale of `weight`.
        form: which exact form to run; "auto" chooses by shape (`choose_form`).
        kept: of this kernel, where it is frozen.
    """
    if form == "auto":
        form = choose_form(x, weight, styles, residual)
    if form == "grouped":
        return _grouped(x, weight, styles, scale, gain, should_demodulate, up, residual)
    if x.dtype == torch.float16 and should_demodulate and residual is None:
        # Keep half-precision products in range; demodulation undoes both scales.
        weight, kept = weight / weight.detach().abs().amax(), None
        styles = styles / styles.detach().abs().amax(dim=1, keepdim=True)
    # The scale rides on d (or on the gain), so that no scaled copy of the kernel is made.
    gain = gain * scale
    added: LowRank | SharedResidual | None = residual
    if residual is not None and residual.is_shared:
        added = _shared(residual, weight, up, kept)
    d = demodulate(weight, styles, added, scale, kept) * gain if should_demodulate else None
    is_product = form == "folded" and isinstance(added, LowRank)  # made in the stored order
    if kept is not None and _is_channels_last(x) and not is_product:
        weight = kept.laid_out
    return (_implicit if form == "implicit" else _folded)(x, weight, styles, d, gain, up, added)


def choose_form(
    x: Tensor, weight: Tensor, styles: Tensor, residual: LowRank | None
) -> Literal["implicit", "folded"]:
    """Fold where one sample's kernel is smaller than twice its activations, else stay implicit.

    A kernel that learns, a residual that learns and a GPU take the implicit form: it has an
    ordinary (twice differentiable) graph and its kernel gradient is one convolution for the batch.
    Without a graph a batch stays implicit too, since its scalings then run in place; large
    activations come one sample at a time (`Generator.synthesis`), and those fold.
    """
    tensors = [x, weight, styles, *([residual.u, residual.v] if residual else [])]
    has_graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    is_learning = has_graph and (weight.requires_grad or residual is not None)
    o, i, k, _ = weight.shape
    if not has_graph and residual is not None and residual.is_shared and not x.is_cuda:
        # One addition to the kernel costs nothing; a narrow convolution costs as its pixels do.
        return "folded" if 2 * o * i * k * k < x.shape[2] * x.shape[3] * (i + o) else "implicit"
    if is_learning or x.is_cuda or (not has_graph and x.shape[0] > 1):
        return "implicit"
    return "folded" if o * i * k * k < 2 * x.shape[2] * x.shape[3] * (i + o) else "implicit"


class SharedResidual:
    """A residual that all samples share, beside a kernel W, and what is computed of both.

    Attributes:
        kernel: dW [O I k k], in the memory order of W.
        sums: `2 sum_k W dW` [O I] and `sum_ik dW^2` [O].
        taps: of v [1 r I k k], as `_narrow_conv` takes them.
    """

    def __init__(self, one: LowRank, weight: Float[Tensor, "O I k k"], up: bool) -> None:
        one = one.to(dtype=weight.dtype)
        self.u, self.v, self.taps = one.u, one.v, _taps(one.v, up)
        self.kernel = _in_order_of(weight, one.kernel()[0])
        cross = (weight * self.kernel).flatten(2)  # [O I kk]
        u, v = one.u[0], one.v[0].flatten(1)
        # A product is faster than a sum.
        self.sums = cross @ cross.new_full((cross.shape[2],), 2.0), ((u @ (v @ v.T)) * u).sum(1)


class FrozenKernel:
    """What is computed of a frozen kernel once: of a small picture's render, the sums over its taps
    cost a quarter, and so does the memory order in which a channels-last convolution reads it.

    Args:
        weight: the kernel; a change in place or another place of its values is noticed.
        up: of the convolution.

    Attributes:
        squares: sum_k W^2, [O I].
    """

    def __init__(self, weight: Float[Tensor, "1 O I k k"], up: bool) -> None:
        self._weight, self._made_of, self._up = weight, _state(weight), up
        with torch.inference_mode(False), torch.no_grad():
            self.squares = _squares(weight[0])
        self._shared: tuple[LowRank, Any, SharedResidual] | None = None

    def fits(self, weight: Tensor) -> bool:
        return weight is self._weight and _state(weight) == self._made_of

    @cached_property
    def laid_out(self) -> Float[Tensor, "O I k k"]:
        """W in the memory order in which a channels-last convolution reads it."""
        with torch.inference_mode(False), torch.no_grad():
            read = self._weight[0].transpose(0, 1) if self._up else self._weight[0]
            read = read.contiguous(memory_format=torch.channels_last)
            return read.transpose(0, 1) if self._up else read

    def shared(self, residual: LowRank) -> SharedResidual:
        """That of the last residual is kept, and with it the factors, so that no other tensor takes
        their place in memory."""
        state, kept = (_state(residual.u), _state(residual.v)), self._shared
        if kept is None or kept[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                found = SharedResidual(residual[0:1], self.laid_out, self._up)
                kept = self._shared = residual, state, found
        return kept[2]


def is_constant(*tensors: Tensor) -> bool:
    """Whether what is computed of the tensors may be kept: nothing learns, changes are counted."""
    return not any(t.requires_grad or t.is_inference() for t in tensors)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype, tensor.shape[1:]


def _shared(
    residual: LowRank, weight: Tensor, up: bool, kept: FrozenKernel | None
) -> SharedResidual:
    if kept is not None and is_constant(residual.u, residual.v):
        return kept.shared(residual)
    return SharedResidual(residual[0:1], weight, up)


def _in_order_of(like: Tensor, values: Tensor) -> Tensor:
    if like.stride() == values.stride():
        return values
    return torch.empty_like(like).copy_(values)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _squares(weight: Float[Tensor, "O I k k"]) -> Float[Tensor, "O I"]:
    return weight.square().sum(dim=(2, 3))


def demodulate(
    weight: Float[Tensor, "O I k k"],
    styles: Float[Tensor, "N I"],
    residual: LowRank | SharedResidual | None = None,
    scale: float = 1.0,
    kept: FrozenKernel | None = None,
) -> Float[Tensor, "N O"]:
    """`d = rsqrt(scale^2 ||K_n,o||^2 + eps)` without building K_n (the low-rank identity above)."""
    squares = _squares(weight) if kept is None else kept.squares
    if isinstance(residual, SharedResidual):
        cross, own = residual.sums
        norm = torch.addmm(torch.addmm(own, styles.square(), squares.T), styles, cross.T)
    else:
        norm = styles.square() @ squares.T  # [N O]
    if isinstance(residual, LowRank):
        u, v = residual.u.to(styles.dtype), residual.v.to(styles.dtype)
        n, r = v.shape[:2]
        sv = (v * styles[:, None, :, None, None]).reshape(n * r, -1)
        cross = (sv @ weight.reshape(weight.shape[0], -1).T).reshape(n, r, -1)  # [N r O]
        gram = v.reshape(n, r, -1)
        gram = gram @ gram.transpose(1, 2)  # [N r r]
        norm = norm + 2 * (u * cross.transpose(1, 2)).sum(2) + ((u @ gram) * u).sum(2)
    return torch.rsqrt(norm * scale**2 + EPS)


def _grouped(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    scale: float,
    gain: float,
    should_demodulate: bool,
    up: bool,
    residual: LowRank | None,
) -> Tensor:
    kernel = weight[None] * styles[:, None, :, None, None]  # [N O I k k]
    if residual is not None:
        kernel = kernel + residual.kernel().to(kernel.dtype)
    kernel = kernel * scale
    if should_demodulate:
        kernel = kernel * torch.rsqrt(kernel.square().sum(dim=(2, 3, 4), keepdim=True) + EPS)
    return _grouped_conv(x, (kernel * gain).to(x.dtype), up)


def _implicit(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    d: Tensor | None,
    gain: float,
    up: bool,
    residual: LowRank | SharedResidual | None,
) -> Tensor:
    dtype = x.dtype
    if d is None:
        weight = weight * gain
    y = _shared_conv(x * styles.to(dtype)[:, :, None, None], weight.to(dtype), up)
    if residual is not None:
        u = residual.u.to(dtype) if d is not None else residual.u.to(dtype) * gain
        y = _add_mixed(y, _side(x, residual, up), u.expand(len(x), -1, -1))
    if d is None:
        return y
    d = d.to(dtype)[:, :, None, None]
    return y * d if y.requires_grad or d.requires_grad else y.mul_(d)


def _side(
    x: Float[Tensor, "N I H W"], residual: LowRank | SharedResidual, up: bool
) -> Float[Tensor, "N r h w"]:
    """`conv(x, v)`."""
    r, i, k = residual.v.shape[1:4]
    is_narrow = not x.is_cuda and k * k * r <= 2 * i
    if isinstance(residual, LowRank):
        v = residual.v.to(x.dtype)
        return _narrow_conv(x, _taps(v, up), k, up) if is_narrow else _per_sample_conv(x, v, up)
    if not is_narrow:
        return _shared_conv(x, residual.v[0].to(x.dtype), up)
    return _narrow_conv(x, residual.taps.to(x.dtype).expand(len(x), -1, -1), k, up)


def _add_mixed(
    y: Float[Tensor, "N O h w"], side: Float[Tensor, "N r h w"], u: Float[Tensor, "N O r"]
) -> Float[Tensor, "N O h w"]:
    """`y + u side`, as one batched matrix product in the memory order that y has."""
    n, o, h, w = y.shape
    if _is_channels_last(y):
        flat = y.permute(0, 2, 3, 1).reshape(n, h * w, o)  # a view
        side_flat = side.permute(0, 2, 3, 1).reshape(n, h * w, -1)
        mixed = _baddbmm(flat, side_flat, u.transpose(1, 2))
        return mixed.reshape(n, h, w, o).permute(0, 3, 1, 2)
    return _baddbmm(y.reshape(n, o, h * w), u, side.reshape(n, -1, h * w)).reshape(n, o, h, w)


def _baddbmm(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if base.requires_grad or a.requires_grad or b.requires_grad:
        return torch.baddbmm(base, a, b)
    return base.baddbmm_(a, b)


def _folded(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    d: Tensor | None,
    gain: float,
    up: bool,
    residual: LowRank | SharedResidual | None,
) -> Tensor:
    if d is None:
        d = styles.new_full((styles.shape[0], weight.shape[0]), gain)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or styles.requires_grad)
    if needs_grad and residual is None and not weight.requires_grad:
        return _FoldedConv.apply(x, weight, styles, d, up)
    kernel = weight[None] * styles[:, None, :, None, None]
    if torch.is_grad_enabled() and (kernel.requires_grad or d.requires_grad or residual):
        if residual is not None:
            added = residual.kernel() if isinstance(residual, LowRank) else residual.kernel
            kernel = kernel + added.to(kernel.dtype)
        kernel = kernel * d[:, :, None, None, None]
    else:
        if isinstance(residual, SharedResidual):
            kernel.add_(residual.kernel)
        elif residual is not None:
            u, v = residual.u.to(kernel.dtype), residual.v.to(kernel.dtype)
            kernel.view(*kernel.shape[:2], -1).baddbmm_(u, v.flatten(2))  # in place
        kernel.mul_(d[:, :, None, None, None])
    return _per_sample_conv(x, kernel.to(x.dtype), up)


def _shared_conv(x: Tensor, weight: Tensor, up: bool) -> Tensor:
    if up:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return F.conv2d(x, weight, padding=weight.shape[2] // 2)


def _per_sample_conv(
    x: Float[Tensor, "N I H W"], kernels: Float[Tensor, "N O I k k"], up: bool
) -> Float[Tensor, "N O h w"]:
    """A kernel per sample: one grouped convolution, or a loop where grouping would copy x."""
    n = len(kernels)
    if n == 1:
        return _shared_conv(x, kernels[0], up)
    if not x.is_contiguous():
        if torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad):
            return torch.cat([_shared_conv(x[s : s + 1], kernels[s], up) for s in range(n)])
        # Each result moves to its place while it is in the cache: half of the time of joining.
        y = _shared_conv(x[0:1], kernels[0], up)
        found = torch.empty(
            (n, *y.shape[1:]), dtype=y.dtype, device=y.device, memory_format=torch.channels_last
        )
        found[0:1] = y
        for s in range(1, n):
            found[s : s + 1] = _shared_conv(x[s : s + 1], kernels[s], up)
        return found
    return _grouped_conv(x, kernels, up)


def _taps(kernels: Float[Tensor, "N r I k k"], up: bool) -> Float[Tensor, "N (r k k) I"]:
    """`fold` adds tap (a, b) of an input pixel to the output pixel that is (a, b) further on: a
    transposed convolution as it stands, an ordinary one with the taps turned around."""
    taps = kernels if up else kernels.flip(3, 4)
    return taps.permute(0, 1, 3, 4, 2).flatten(1, 3)


def _narrow_conv(
    x: Float[Tensor, "N I H W"], taps: Float[Tensor, "N (r k k) I"], k: int, up: bool
) -> Float[Tensor, "N r h w"]:
    """A kernel per sample with few outputs: one batched matrix product, then sums over the taps.

    The products of all taps, k k r values a pixel, are what it holds in between: worth it where
    they are not many more than the I of the input. Measured at 64 px with r = 4 on a CPU: half of
    the time of a convolution per sample, forward and backward; a quarter with r = 2.
    """
    n, i, h, w = x.shape
    products = torch.bmm(taps, x.permute(0, 2, 3, 1).reshape(n, h * w, i).transpose(1, 2))
    if up:
        return F.fold(products, (2 * h + k - 2, 2 * w + k - 2), k, stride=2)
    return F.fold(products, (h, w), k, padding=k // 2)


def _grouped_conv(
    x: Float[Tensor, "N I H W"], kernels: Float[Tensor, "N O I k k"], up: bool
) -> Float[Tensor, "N O h w"]:
    n, o, i, k, _ = kernels.shape
    x = x.reshape(1, n * i, *x.shape[2:])
    if up:
        weight = kernels.transpose(1, 2).reshape(n * i, o, k, k)
        y = F.conv_transpose2d(x, weight, stride=2, groups=n)
    else:
        y = F.conv2d(x, kernels.reshape(n * o, i, k, k), padding=k // 2, groups=n)
    return y.reshape(n, o, *y.shape[2:])


class _FoldedConv(torch.autograd.Function):
    """`conv(x, d W s)` with a frozen W: exact gradients of x, s and d, none of the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, styles: Tensor, d: Tensor, up: bool) -> Tensor:
        kernel = weight[None] * (d[:, :, None] * styles[:, None, :])[..., None, None]
        y = _per_sample_conv(x, kernel.to(x.dtype), up)
        ctx.save_for_backward(x, weight, styles, d, y)
        ctx.up = up
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, styles, d, y = ctx.saved_tensors  # type: ignore[attr-defined]
        n, o, i, k = x.shape[0], *weight.shape[:3]
        kernel = (weight[None] * d[:, :, None, None, None]).to(gy.dtype)  # [N O I k k]
        flat = gy.reshape(1, n * o, *gy.shape[2:])
        if ctx.up:  # type: ignore[attr-defined]
            back = kernel.transpose(1, 2).reshape(n * i, o, k, k)
            gu = F.conv2d(flat, back, stride=2, groups=n)
        else:
            back = kernel.reshape(n * o, i, k, k)
            gu = F.conv_transpose2d(flat, back, padding=k // 2, groups=n)
        gu = gu.reshape(x.shape)  # the gradient of s * x
        gs = (x * gu).sum(dim=(2, 3)).to(styles.dtype)
        gd = ((gy * y).sum(dim=(2, 3)).to(d.dtype)) / d
        return gu * styles.to(gu.dtype)[:, :, None, None], None, gs, gd, None

"""RefineStyle without a network: the token sets of every picture, optimised directly.

Source: RefineStyle (arXiv 2410.06104) adds `P^T Q` to each modulated kernel; its inversion predicts
the two sets, its domain adaptation optimises them. Here the sets of each picture are optimised, as
PTI (arXiv 2106.05744) tunes a generator to each picture, but over some thousand values instead of a
generator, and for a whole batch at once: every kernel is shared, only the factors are a picture's.

Legend: N batch, A active rows of it, T tokens of a set, L num_ws, D w_dim, H W image.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.inversion.base import Inversion, Method, SampleRng, frozen
from models.inversion.picture_loss import PictureLoss
from models.inversion.row_search import RowSearch, SearchSettings
from models.settings import Count, CountOrNone, NotNegative, Positive, Share
from models.stylegan2.generator import Begun, Generator
from models.stylegan2.residual import LowRank, Residual
from models.stylegan2.tokens import Factorization, kernel_channels, token_layouts


@dataclass(frozen=True, kw_only=True)
class RefineOptConfig(SearchSettings):
    """Settings of the method `refine_opt`. The defaults suit 64 px."""

    steps: CountOrNone = 44
    """Updates for each picture; 0 keeps the start."""
    learning_rate: Positive = 0.05
    """Peak rate of Adam on the tokens."""
    ramp_down: Share = 0.5
    """Share of the steps, at the end, in which the rate falls to 0 along a cosine."""
    code_rate: NotNegative = 0.0
    """Peak rate of Adam on the codes; 0 keeps those of the method before."""
    factorization: Factorization = "shared"
    """How two token sets become a kernel: "shared", "per_tap" or "conv_lora"."""
    rank: Count = 2
    """Tokens of each set ("per_tap": for each tap of the kernel)."""
    layers: list[int] = field(default_factory=list)
    """Indices of the refined 3x3 layers, 0 at 4x4 px; none stands for all."""

    def rate(self, step: int) -> float:
        """Adam's rate of the update `step`, 0-based."""
        down = min(1.0, (1 - step / self.steps) / self.ramp_down) if self.ramp_down else 1.0
        return self.learning_rate * (0.5 - 0.5 * math.cos(math.pi * down))


class RefineOpt(Method):
    """Adam on the kernel residuals of every picture of the batch, each as if it were alone."""

    Config = RefineOptConfig
    needs_init = True
    summary = "optimises low-rank kernel residuals of each picture (RefineStyle, arXiv 2410.06104)"

    def __init__(self, generator: Generator, config: RefineOptConfig) -> None:
        super().__init__(generator, config)
        self.picture_loss = PictureLoss(config)
        self.layouts = token_layouts(
            kernel_channels(generator), config.layers, config.factorization, config.rank
        )

    def hashes(self) -> dict[str, str]:
        return self.picture_loss.hashes()

    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`. Noise, features and a residual of `init` are kept and rendered with;
        the new residual is added to that one.

        The result is the best that was rendered on the way, by its own loss. A picture whose loss
        or gradient is not finite is a failure with the step; its neighbours do not notice.
        """
        self.check_inputs(images, init, rng)
        assert init is not None
        self.picture_loss.to(images.device)
        # The caller may run in inference mode, whose tensors autograd refuses: work on copies.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            search = _TokenSearch(self, images.detach().float().clone(), init.detached(), rng)
            search.descend()
            return search.result()


class _TokenSearch(RowSearch):
    """Token sets of one batch, P then Q of each layer, and the shift of the codes if they move.

    P starts as N(0, 1/r) (standard deviation 1/sqrt(r)) and Q at zero, so the first render is the
    start's and the first gradient is Q's.
    """

    def __init__(
        self,
        method: RefineOpt,
        images: Float[Tensor, "N 3 H W"],
        start: Inversion,
        rng: SampleRng,
    ) -> None:
        self.generator, self.config, self.layouts = method.generator, method.config, method.layouts
        tensors: list[Tensor] = []
        for layout in self.layouts.values():
            p = rng.randn(layout.count, layout.p_width, device=images.device)
            tensors += [
                p / math.sqrt(layout.rank),
                p.new_zeros(len(p), layout.count, layout.q_width),
            ]
        if self.config.code_rate:
            tensors.append(torch.zeros_like(start.w_plus))
        self.whole = self._begun(start)
        super().__init__("refine_opt", self.config, method.picture_loss, images, start, tensors)

    def rate(self, step: int) -> float:
        return self.config.rate(step)

    def loss(self, tensors: list[Tensor]) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
        residual = self._residual(tensors, self.residual)
        codes = self._codes(tensors, self.start.w_plus[self.rows])
        noise = self.given(self.start.noise) or "const"
        images = self.generator.synthesis(codes, noise, self.features, residual, begun=self.begun)
        return self.picture_loss(images, self.targets, self.target_features)

    def result(self) -> Inversion:
        """The best of every row; a failed row keeps its start or the last finite best."""
        return replace(
            self.start,
            w_plus=self._codes(self.best, self.start.w_plus).contiguous(),
            residual={
                layer: LowRank(u=r.u.contiguous(), v=r.v.contiguous())
                for layer, r in self._residual(self.best, self.start.residual).items()
            },
            failures=self.failures,
        )

    def _shrink(self, keep: Bool[Tensor, " A"]) -> None:
        super()._shrink(keep)
        self.begun = None if self.whole is None else self.whole[self.rows]

    def _begun(self, start: Inversion) -> Begun | None:
        """What no step changes: the layers before the first refined one, while the codes stay."""
        first = min(self.layouts)
        if self.config.code_rate or not first:
            return None
        with torch.no_grad():
            return self.generator.begin(layer=first, **start.doors())

    def _codes(
        self, tensors: list[Tensor], start: Float[Tensor, "A L D"]
    ) -> Float[Tensor, "A L D"]:
        if not self.config.code_rate:
            return start
        # One optimiser with one rate: the shift is held in units that make it the codes' own.
        return start + self.config.code_rate / self.config.learning_rate * tensors[-1]

    def _residual(self, tensors: list[Tensor], before: Residual | None) -> dict[int, LowRank]:
        found = dict(before or {})
        for index, (layer, layout) in enumerate(self.layouts.items()):
            own = layout.low_rank(tensors[2 * index], tensors[2 * index + 1])
            found[layer] = LowRank.total([found[layer], own]) if layer in found else own
        return found

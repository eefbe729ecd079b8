"""The descent: all active domains in one batch, each as if it were alone.

A domain's codes, lines and shifts come from streams that its neighbours do not touch, its gradient
from its own pictures, its moments from its own row; what leaves (stopped, diverged) leaves the
others as they were.

Legend: N domains, A active ones, B pictures of each, L num_ws, D w_dim, H W image.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.views import crop_maps, moved, random_maps
from models.inversion.base import sample_seed
from models.optim import RowAdam
from models.stylegan2.generator import Generator
from tasks.adapt.config import AdaptConfig
from tasks.adapt.forms import Form
from tasks.adapt.guidance import Guide, Judges, Seen, joint_terms, look

Status = Literal["running", "finished", "stopped", "diverged"]


@dataclass(kw_only=True)
class DomainState:
    """How one domain fares.

    Attributes:
        score: the best validation score so far (lower is better), and its step.
        scores: the terms of that score.
        note: what an operator should know (why it stopped).
    """

    status: Status = "running"
    note: str = ""
    score: float = math.inf
    best_step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    misses: int = 0
    steps: int = 0


class Descent:
    """The state of one job.

    Args:
        guides: one for each domain, in the config's order.
        form: what is optimised.
        judges: networks of the losses.
    """

    def __init__(
        self,
        config: AdaptConfig,
        generator: Generator,
        guides: Sequence[Guide],
        form: Form,
        judges: Judges,
    ) -> None:
        self.config, self.generator, self.judges = config, generator, judges
        self.guides, self.form = list(guides), form
        self.adam = RowAdam([t.clone() for t in form.start])
        self.best = [t.clone() for t in form.start]
        self.states = [DomainState() for _ in guides]
        self.rows = list(range(len(guides)))
        self.step = 0
        self.codes_rng = torch.Generator().manual_seed(sample_seed(config.seed, "codes"))
        held_out = torch.Generator().manual_seed(sample_seed(config.seed, "validation"))
        self.held_out = self._codes(config.validation_codes, held_out)

    # ------------------------------------------------------------------ one step

    def advance(self) -> None:
        """One update of every active domain; scores them first where it is time to."""
        if self.step % self.config.validation_every == 0:
            self.validate()
        if not self.rows:
            return
        w_plus = self._codes(self.config.batch, self.codes_rng)
        maps = self._views(len(w_plus))
        with torch.no_grad():
            before = self._look(self._source(w_plus), maps)
        tensors = [t.detach().requires_grad_() for t in self.adam.tensors]
        terms = self._terms(tensors, w_plus, before, maps, is_training=True)
        losses = torch.stack([torch.stack(list(t.values())).sum(0).mean() for t in terms])
        gradients = torch.autograd.grad(losses.sum(), tensors)
        is_finite = torch.stack([g.isfinite().flatten(1).all(1) for g in gradients]).all(0)
        is_finite &= losses.detach().isfinite()
        self.adam.step(gradients, self.config.rate(self.step))
        self.step += 1
        for row in self.rows:
            self.states[row].steps = self.step
        if not bool(is_finite.all()):
            note = f"loss or gradient not finite in step {self.step}"
            self._drop(~is_finite.cpu(), "diverged", note)

    def finish(self) -> None:
        """The last score; active domains are finished."""
        self.validate()
        for row in self.rows:
            self.states[row].status = "finished"
        self.rows = []

    @torch.no_grad()
    def validate(self) -> None:
        """Score the active domains on the held-out codes; keep what is best, stop what is done.

        The score is the loss without the adversarial term, with the same lines and the plain view
        every time.
        """
        if not self.rows:
            return
        before = self._look(self._source(self.held_out), [])
        terms = self._terms(self.adam.tensors, self.held_out, before, [], is_training=False)
        is_lost, is_done = [], []
        for at, (row, values) in enumerate(zip(self.rows, terms, strict=True)):
            scores = {name: float(value.mean()) for name, value in values.items()}
            total, state = sum(scores.values()), self.states[row]
            # Where a critic pulls, the score does not see what was won by it: the last is kept.
            is_better = total < state.score  # False for a score that is not a number
            state.misses = 0 if is_better else state.misses + 1
            if is_better or (self.guides[row].critic is not None and math.isfinite(total)):
                state.score, state.scores, state.best_step = total, scores, self.step
                for best, tensor in zip(self.best, self.adam.tensors, strict=True):
                    best[row] = tensor[at]
            is_lost.append(not math.isfinite(total))
            patience = self.config.patience
            is_done.append(bool(patience) and state.misses >= patience)
        self._drop(torch.tensor(is_lost), "diverged", f"score not finite after {self.step} steps")
        left = torch.tensor([d for d, lost in zip(is_done, is_lost, strict=True) if not lost])
        self._drop(left.bool(), "stopped", f"no better score for {self.config.patience} rounds")

    # ------------------------------------------------------------------ what it renders

    def _terms(
        self,
        tensors: Sequence[Tensor],
        w_plus: Float[Tensor, "B L D"],
        before: Seen,
        maps: Sequence[Tensor],
        *,
        is_training: bool,
    ) -> list[dict[str, Float[Tensor, " B"]]]:
        """The loss terms of every active domain: one render and one look for all of them."""
        count = len(self.rows)
        codes = w_plus[None].expand(count, *w_plus.shape)
        repeated = [part.repeat(count, 1, 1) for part in maps]
        after = self._look(self.form.render(tensors, codes), repeated)
        own = self._own_renders(tensors)
        known = joint_terms([self.guides[row] for row in self.rows], after, before)
        found = []
        for at, row in enumerate(self.rows):
            guide, size = self.guides[row], len(w_plus)
            rng = guide.rng if is_training else torch.Generator().manual_seed(self.config.seed)
            found.append(
                guide.losses(
                    after[at * size : (at + 1) * size],
                    before,
                    own.get(row),
                    rng,
                    is_training=is_training,
                    known=known[at],
                )
            )
        return found

    def _own_renders(self, tensors: Sequence[Tensor]) -> dict[int, Seen]:
        """The references' own codes in their new domains, where the guidance is one image."""
        pairs = [(at, self.guides[row].reference) for at, row in enumerate(self.rows)]
        chosen = [(at, reference) for at, reference in pairs if reference is not None]
        if not chosen:
            return {}
        index = torch.tensor([at for at, _ in chosen], device=tensors[0].device)
        codes = torch.stack([reference.w_plus for _, reference in chosen])  # [A 1 L D]
        seen = self._look(self.form.render([t[index] for t in tensors], codes), [])
        return {self.rows[at]: seen[i : i + 1] for i, (at, _) in enumerate(chosen)}

    def _look(self, images: Float[Tensor, "B 3 H W"], maps: Sequence[Tensor]) -> Seen:
        """Through the judges; CLIP sees the pictures under `maps`, or plain where there is none."""
        with self._precision():
            views = [moved(images, part) for part in maps] if self.judges.clips else []
            return look(images, views or [images], self.judges)

    def _source(self, w_plus: Float[Tensor, "B L D"]) -> Float[Tensor, "B 3 H W"]:
        return self.generator.synthesis(w_plus, self.config.noise)

    def _precision(self) -> AbstractContextManager[Any]:
        device = self.generator.latent_avg.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _views(self, count: int) -> list[Float[Tensor, "B 2 3"]]:
        """The whole picture, moved a little, and parts of it."""
        whole = random_maps(count, self.config.augment, self.codes_rng)
        parts = [crop_maps(count, self.codes_rng) for _ in range(self.config.views - 1)]
        return [whole, *parts]

    def _codes(self, count: int, rng: torch.Generator) -> Float[Tensor, "B L D"]:
        """Random codes, some of them two that are joined at a random row."""
        w_plus, other = self._mapped(count, rng), self._mapped(count, rng)
        rows = torch.randint(1, self.generator.num_ws, (count,), generator=rng)
        is_mixed = torch.rand(count, generator=rng) < self.config.mixing
        is_other = is_mixed[:, None] & (torch.arange(self.generator.num_ws) >= rows[:, None])
        return torch.where(is_other[..., None].to(w_plus.device), other, w_plus)

    @torch.no_grad()
    def _mapped(self, count: int, rng: torch.Generator) -> Float[Tensor, "B L D"]:
        z = torch.randn(count, self.generator.z_dim, generator=rng)
        return self.generator.mapping(
            z.to(self.generator.latent_avg.device), truncation_psi=self.config.truncation_psi
        )

    def _drop(self, which: Tensor, status: Status, note: str) -> None:
        if not bool(which.any()):
            return
        for row, is_dropped in zip(self.rows, which.tolist(), strict=True):
            if is_dropped:
                self.states[row].status, self.states[row].note = status, note
        self.adam.keep(~which.to(self.adam.tensors[0].device))
        self.rows = [r for r, gone in zip(self.rows, which.tolist(), strict=True) if not gone]

    # ------------------------------------------------------------------ resume

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the job depends on."""
        return {
            "step": self.step,
            "rows": self.rows,
            "tensors": self.adam.tensors,
            "moments": self.adam.moments,
            "squares": self.adam.squares,
            "count": self.adam.count,
            "best": self.best,
            "states": [vars(state) for state in self.states],
            "codes_rng": self.codes_rng.get_state(),
            "guides": [guide.state() for guide in self.guides],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step, self.rows = state["step"], list(state["rows"])
        self.adam.tensors = list(state["tensors"])
        self.adam.moments, self.adam.squares = list(state["moments"]), list(state["squares"])
        self.adam.count = state["count"]
        self.best = list(state["best"])
        self.states = [DomainState(**values) for values in state["states"]]
        self.codes_rng.set_state(state["codes_rng"])
        for guide, values in zip(self.guides, state["guides"], strict=True):
            guide.restore(values)

"""A domain: kernel tokens that turn a frozen generator's pictures into another style.

RefineStyle (arXiv 2410.06104) adapts by optimising the two token sets of each kernel, shared by all
pictures; mapping, affines and static kernels stay. So a stored code, an edit and an image's own
residual go on working, and domains add up: W s + g1 dW_image + g2 dW_domain. A strength g2 in 0..1
morphs. A fine-tuned generator (StyleGAN-NADA) fits behind the same interface as `weights`.

On disk a domain is a folder: `tokens.safetensors` (or `weights.safetensors`), `card.json`,
`preview.png`.

Legend: N batch, L num_ws, D w_dim.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.adaptation.mixing import mixed_residual, mixed_weights, summed
from models.adaptation.token_sets import TokenSets
from models.checkpoints.bundled import ASSETS
from models.errors import AssetError, ConfigError
from models.files import atomically, file_sha256
from models.inversion.base import Inversion
from models.stylegan2.generator import Generator, check_made_for, weights_hash
from models.stylegan2.residual import LowRank, Residual
from models.stylegan2.tokens import FACTORIZATIONS
from models.stylegan2.weight_delta import TunedWeights, WeightDelta

FORMAT = "style-refinery domain 1"
CARD = "card.json"
TOKENS, WEIGHTS = "tokens.safetensors", "weights.safetensors"

Mix = Sequence[tuple["Domain", float]]
"""What one picture gets: domains with strengths. They add up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Domain:
    """One style for one generator.

    Attributes:
        generator_hash: `weights_hash` of the generator whose kernels it changes.
        residual: low-rank kernel additions of batch size 1, float32.
        weights: in place of it, changes of the generator's parameters, of batch size 1.
        card: guidance, settings, steps, scores, terms: what the reader should know.
        tokens: the sets that `residual` was made of, where they are known.
    """

    name: str
    generator_hash: str
    residual: Residual | None = None
    weights: TunedWeights | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    tokens: TokenSets | None = None

    def __post_init__(self) -> None:
        if (self.residual is None) == (self.weights is None):
            raise ValueError(f"domain {self.name}: expected either a residual or weights")
        sizes = {len(part.u) for part in (self.residual or {}).values()}
        sizes |= {len(delta.codes) for delta in (self.weights or {}).values()}
        if sizes - {1}:
            raise ValueError(f"domain {self.name}: expected batch size 1, found {sorted(sizes)}")

    @staticmethod
    def of_tokens(
        name: str, generator_hash: str, tokens: TokenSets, card: Mapping[str, Any]
    ) -> "Domain":
        """A domain of token sets [1 ...], with the half-precision values that its file will hold:
        what is scored is what is stored."""
        kept = tokens.rounded()
        return Domain(
            name=name,
            generator_hash=generator_hash,
            residual=kept.residual(),
            card=card,
            tokens=kept,
        )

    def check_generator(self, generator: Generator) -> None:
        """Refuse a domain of another generator.

        Raises:
            AssetError: the hashes differ.
        """
        remedy = "choose that generator, or make the domain again with `refinery adapt`"
        check_made_for(f"domain {self.name}", self.generator_hash, generator, remedy)


def save_domain(domain: Domain, folder: str | Path) -> Path:
    """Write the tokens (half precision) or weights and the card into `folder`; returns it.

    Each file is replaced whole, the card last: it names the sha256 of the other.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if domain.weights is not None:
        file = folder / WEIGHTS
        tensors = {f"{k}.codes": d.codes for k, d in domain.weights.items()}
        tensors |= {f"{k}.step": d.step.half() for k, d in domain.weights.items()}
        metadata = None
    else:
        file = folder / TOKENS
        tokens = domain.tokens or TokenSets.of_residual(domain.residual or {})
        tensors = {name: t.half() for name, t in tokens.tensors().items()}
        metadata = {"factorization": tokens.factorization}  # one key: more have no fixed order
    data = save({k: t.cpu().contiguous() for k, t in tensors.items()}, metadata)
    with atomically(file) as tokens_file:
        tokens_file.write(data)
    card = {
        "format": FORMAT,
        "name": domain.name,
        "generator_hash": domain.generator_hash,
        "file": file.name,
        "sha256": file_sha256(file),
        "bytes": len(data),
        **domain.card,
    }
    with atomically(folder / CARD) as card_file:
        card_file.write((json.dumps(card, indent=1) + "\n").encode())
    return folder


def load_domain(folder: str | Path) -> Domain:
    """Read what `save_domain` wrote: float32, on the CPU.

    Raises:
        AssetError: missing, damaged, or not such a folder.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text())
        if card.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        names = {k: card.pop(k) for k in ("name", "generator_hash")}
        file = folder / card.pop("file")
        found = file_sha256(file)
        if found != (wanted := card.pop("sha256")):
            raise ValueError(f"{file.name} has sha256 {found[:12]}..., not {wanted[:12]}...")
        if file.name == WEIGHTS:
            return Domain(**names, weights=_read_weights(file), card=card)
        tokens = _read_tokens(file)
        return Domain(**names, residual=tokens.residual(), card=card, tokens=tokens)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise AssetError(
            f"domain {folder}: cannot read ({error!r}); expected {CARD} and {TOKENS} as "
            "`refinery adapt` writes them: copy the whole folder again, or adapt again"
        ) from error


def find_domain(
    name_or_path: str, generator: Generator, folders: Sequence[str | Path] = ("domains",)
) -> Domain:
    """A domain by its folder, by its name below one of `folders`, or by a bundled name.

    Raises:
        ConfigError: there is none; the message names those that are known.
        AssetError: it belongs to another generator, or cannot be read.
    """
    domain = _found(name_or_path, generator, folders)
    domain.check_generator(generator)
    return domain


def move_domain(
    name_or_path: str, child: Generator, folders: Sequence[str | Path] = ("domains",)
) -> Domain:
    """A domain of a parent on a generator that was fine-tuned from it: what it adds to the parent's
    kernels and affines means the same in the child's (StyleDomain, arXiv 2212.10229, section 5).

    Raises:
        ConfigError: there is no such domain.
        AssetError: the generator's layers have other shapes: it is no child.
    """
    domain = _found(name_or_path, child, folders)
    own = {name: tuple(p.shape) for name, p in child.named_parameters()}
    wanted = {k: tuple(d.codes.shape[1:]) for k, d in (domain.weights or {}).items()}
    for layer, part in (domain.residual or {}).items():
        at = "conv1" if layer == 0 else f"convs.{layer - 1}"
        wanted[f"{at}.conv.weight"] = (1, part.u.shape[1], *part.v.shape[2:])
    if wrong := sorted(name for name, shape in wanted.items() if own.get(name) != shape):
        raise AssetError(
            f"domain {domain.name}: {wrong[0]} is {wanted[wrong[0]]} in its generator and "
            f"{own.get(wrong[0], 'missing')} here; a domain moves to a generator that was "
            "fine-tuned from its own, not to another one: make it again with `refinery adapt`"
        )
    card = {**domain.card, "moved_from": domain.generator_hash}
    return replace(domain, generator_hash=weights_hash(child), card=card)


def _found(name_or_path: str, generator: Generator, folders: Sequence[str | Path]) -> Domain:
    known = known_domains(generator, folders)
    if (Path(name_or_path) / CARD).is_file():
        return load_domain(name_or_path)
    if name_or_path in known:
        return load_domain(known[name_or_path])
    strangers = sorted(ASSETS.glob(f"*/domains/{name_or_path}/{CARD}")) if name_or_path else []
    if strangers:
        return load_domain(strangers[0].parent)
    if name_or_path and Path(name_or_path).exists():
        raise ConfigError(
            f"domain {name_or_path!r}: expected a folder with {CARD}, as `refinery adapt` writes it"
        )
    near = difflib.get_close_matches(name_or_path, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"domain {name_or_path!r}: not known; {hint}known for this generator: "
        f"{', '.join(sorted(known)) or '(none)'}; looked in "
        f"{', '.join([*map(str, folders), 'the bundled ones'])}; make one with `refinery adapt`"
    )


def known_domains(
    generator: Generator, folders: Sequence[str | Path] = ("domains",)
) -> dict[str, Path]:
    """Folders by name: those below `folders` come before the generator's bundled ones."""
    digest = weights_hash(generator)
    found: dict[str, Path] = {}
    for card in sorted(ASSETS.glob(f"*/domains/*/{CARD}")):
        if json.loads(card.read_text()).get("generator_hash") == digest:
            found[card.parent.name] = card.parent
    for folder in reversed(folders):
        found |= {card.parent.name: card.parent for card in sorted(Path(folder).glob(f"*/{CARD}"))}
    return found


def add_domains(inversion: Inversion, mixes: Sequence[Mix]) -> Inversion:
    """The same pictures in other domains: kernel residuals of image and domains add up.

    Args:
        mixes: one mix for each row, or one for all: domains with strengths. At strength 0 nothing
            is added: the plain picture bit for bit (beside rows that have a domain, a row with an
            own residual moves by rounding). Rows may carry different domains of different ranks at
            the cost of the largest; one mix for all rows is the cheapest.

    Raises:
        ValueError: another number of mixes than rows.
        ConfigError: an inversion that tuned weights itself meets a domain of weights.
    """
    n, device = len(inversion), inversion.w_plus.device
    if len(mixes) not in (1, n):
        raise ValueError(f"domains: expected one mix, or one for each of {n} rows: {len(mixes)}")
    active = [[(domain, g) for domain, g in mix if g != 0] for mix in mixes]
    if len(active) > 1 and all(mix == active[0] for mix in active):
        active = active[:1]
    changed = inversion
    tokens = [tuple((d, g) for d, g in mix if d.residual is not None) for mix in active]
    if any(tokens):
        w_plus = inversion.w_plus
        if len(tokens) == 1:
            joined = _joined(tokens[0], w_plus.device, w_plus.dtype)
            added = {layer: part.expand(n) for layer, part in joined.items()}
        else:
            added = mixed_residual([_residuals(mix) for mix in tokens], n, w_plus)
        changed = replace(changed, residual=summed(inversion.residual or {}, added))
    weights = [[(d.weights, g) for d, g in mix if d.weights is not None] for mix in active]
    if any(weights):
        if inversion.weights is not None:
            names = sorted({d.name for mix in active for d, _ in mix if d.weights is not None})
            raise ConfigError(
                f"domains {', '.join(names)} replace the generator's weights, and so does this "
                "inversion (pti): choose domains of tokens, or an inversion by another method"
            )
        changed = replace(changed, weights=mixed_weights(weights, n, device))
    return changed


@lru_cache(maxsize=16)
def _joined(
    mix: tuple[tuple[Domain, float], ...], device: torch.device, dtype: torch.dtype
) -> dict[int, LowRank]:
    """One mix for all pictures, the same tensors each time: the layers keep what they compute of
    them (`FrozenKernel`)."""
    with torch.inference_mode(False), torch.no_grad():
        return mixed_residual([_residuals(mix)], 1, torch.empty(0, device=device, dtype=dtype))


def _residuals(mix: Sequence[tuple[Domain, float]]) -> list[tuple[Residual, float]]:
    return [(domain.residual or {}, strength) for domain, strength in mix]


def without_noise(w_plus: Float[Tensor, "N L D"], generator: Generator) -> Inversion:
    """Codes that render without noise: how a domain is learned, shown and scored."""
    sides = [generator.conv_resolution(index) for index in range(generator.num_convs)]
    noise = tuple(w_plus.new_zeros(len(w_plus), 1, side, side) for side in sides)
    return Inversion(w_plus=w_plus, noise=noise)


def _read_tokens(file: Path) -> TokenSets:
    with safe_open(file, "pt") as stored:
        kind = (stored.metadata() or {}).get("factorization")
        tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
    if kind not in FACTORIZATIONS:
        raise ValueError(f"factorization: expected one of {FACTORIZATIONS}, found {kind!r}")
    if not all(t.isfinite().all() for t in tensors.values()):
        raise ValueError("tokens that are not finite")
    return TokenSets.from_tensors(tensors, kind)


def _read_weights(file: Path) -> dict[str, WeightDelta]:
    with safe_open(file, "pt") as stored:
        names = sorted(key.removesuffix(".codes") for key in stored.keys() if key.endswith("codes"))  # noqa: SIM118
        return {
            name: WeightDelta(
                codes=stored.get_tensor(f"{name}.codes"),
                step=stored.get_tensor(f"{name}.step").float(),
            )
            for name in names
        }

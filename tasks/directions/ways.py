"""`refinery directions fit`: every way to find a direction, one config and one function for each.

Each writes `<out>/<name>.json` and returns the paths. boundary: stored codes and labels
(`tasks.directions.boundaries`); ganspace and sefa: the generator alone; text: CLIP; file: a raw
vector.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoints.load import load_generator
from models.editing.direction import Direction, save_direction
from models.editing.files import import_direction
from models.editing.ganspace import ganspace_direction
from models.editing.sefa import sefa_directions
from models.editing.style_text import cached_relevance, style_text_direction
from models.errors import ConfigError
from models.losses.clip import load_clip
from models.losses.clip_direction import TEMPLATES, text_direction
from models.statistics import statistics_for
from tasks.directions.boundaries import FitBoundaryConfig, FitDirectionsConfig, fit_boundaries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One principal component and what it was seen to change."""

    __pydantic_config__ = {"extra": "forbid"}

    component: int
    """0 is the one of largest variance."""
    name: str | None = None
    """By default "component-<number>"."""
    layers: tuple[int, ...] | None = None
    """Rows of w+ that move; None for all."""
    is_set: bool = False
    """A strength is what row 0 becomes along the component, as in the published edits, instead of
    what is added."""


@dataclass(frozen=True, kw_only=True)
class FitGanspaceConfig(FitDirectionsConfig):
    """GANSpace: principal components of W."""

    components: tuple[Component, ...] = tuple(Component(component=i) for i in range(10))
    """Which to write."""


@dataclass(frozen=True, kw_only=True)
class FitSefaConfig(FitDirectionsConfig):
    """SeFa: eigenvectors of the modulation weights."""

    layers: tuple[int, ...] = (2, 3, 4, 5)
    """Rows of w+ whose layers are factorised, and which move."""
    count: int = 5
    """Directions, largest eigenvalue first; named "<prefix>-0", ..."""
    prefix: str = "sefa"


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """From one text to another."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    """Of the direction."""
    source: str
    """What there is, e.g. "face"."""
    target: str
    """What there shall be more of, e.g. "smiling face"."""
    count: int = 40
    """Style channels that move: the most relevant ones."""
    beta: float | None = None
    """Instead of a count, the relevance from which on a channel moves."""


@dataclass(frozen=True, kw_only=True)
class FitTextConfig(FitDirectionsConfig):
    """StyleCLIP's global directions in style space."""

    pairs: tuple[TextPair, ...]
    """One direction for each."""
    clip: str = "refinery"
    """The bundled CLIP, a folder in transformers' format, or a hub id."""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences in which the texts stand; their embeddings are averaged."""
    samples: int = 32
    """Codes on which each style channel is moved, once per generator and CLIP; 100 published."""
    strength: float = 5.0
    """How far, in standard deviations of the channel."""
    device: str = "cpu"
    """Where the pictures are rendered and embedded, e.g. "cuda"."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig(FitDirectionsConfig):
    """A raw vector of the field: see `models.editing.files.import_direction`."""

    file: str
    """A .npy, .npz, .pt or .pth file."""
    name: str | None = None
    """By default the file's name without its ending."""
    unit: float | None = None
    """Length of a step of strength 1; by default a standard deviation of W along the vector."""
    layers: tuple[int, ...] | None = None
    """Rows of w+ that move; None for all."""
    component: int | None = None
    """Which one of a file of GANSpace's components."""
    is_set: bool = False
    """With a component: a strength is set instead of added."""
    terms: str = "unknown"
    """On which the vector may be used, for the card."""


def fit_ganspace(config: FitGanspaceConfig) -> list[Path]:
    """Raises: AssetError without the generator, ConfigError for a component that is not there."""
    generator = load_generator(config.generator)
    statistics = statistics_for(generator)
    found = [
        ganspace_direction(statistics, c.component, name=c.name, layers=c.layers, is_set=c.is_set)
        for c in config.components
    ]
    return _save(found, config)


def fit_sefa(config: FitSefaConfig) -> list[Path]:
    """Raises: AssetError without the generator, ConfigError for a row that it has not."""
    generator = load_generator(config.generator)
    found = sefa_directions(
        generator, statistics_for(generator), config.layers, config.count, config.prefix
    )
    return _save(found, config)


def fit_text(config: FitTextConfig) -> list[Path]:
    """Texts are checked before the channels' relevance is computed.

    Raises:
        AssetError: the generator or CLIP is not there.
        ConfigError: two texts with the same embedding, a threshold that no channel reaches.
    """
    generator = load_generator(config.generator).to(config.device)
    clip = load_clip(config.clip).to(config.device)
    changes = [text_direction(clip, p.source, p.target, config.templates) for p in config.pairs]
    statistics = statistics_for(generator)
    relevance = cached_relevance(
        generator,
        clip,
        statistics,
        samples=config.samples,
        strength=config.strength,
        on_progress=_LoggedProgress(),
    )
    found = [
        style_text_direction(
            pair.name,
            relevance,
            change,
            statistics,
            count=pair.count,
            beta=pair.beta,
            card={
                "from": pair.source,
                "to": pair.target,
                "clip": clip.name,
                "clip_sha256": clip.hash,
                "samples": config.samples,
            },
        )
        for pair, change in zip(config.pairs, changes, strict=True)
    ]
    return _save(found, config)


def fit_file(config: ImportConfig) -> list[Path]:
    """Raises: AssetError, ConfigError as `import_direction`."""
    found = import_direction(
        config.file,
        load_generator(config.generator),
        config.name,
        unit=config.unit,
        layers=config.layers,
        component=config.component,
        is_set=config.is_set,
        terms=config.terms,
    )
    return _save([found], config)


WAYS: dict[str, tuple[type[FitDirectionsConfig], Callable[[Any], list[Path]]]] = {
    "boundary": (FitBoundaryConfig, fit_boundaries),
    "ganspace": (FitGanspaceConfig, fit_ganspace),
    "sefa": (FitSefaConfig, fit_sefa),
    "text": (FitTextConfig, fit_text),
    "file": (ImportConfig, fit_file),
}
"""Name of a way -> its settings and its function."""


def fit(config: FitDirectionsConfig) -> list[Path]:
    """The files that the config's way writes.

    Raises:
        ConfigError: not a config of a way; else as the way's function.
    """
    for kind, function in WAYS.values():
        if type(config) is kind:
            return function(config)
    raise ConfigError(
        f"directions: no way has settings {type(config).__name__}; ways: {', '.join(WAYS)}"
    )


def _save(found: list[Direction], config: FitDirectionsConfig) -> list[Path]:
    names = [direction.name for direction in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"directions: two of the same name among {', '.join(names)}")
    return [save_direction(d, Path(config.out) / f"{d.name}.json") for d in found]


class _LoggedProgress:
    """Logs every tenth of the channels."""

    def __init__(self) -> None:
        self.said = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth > self.said:
            self.said = tenth
            logger.info("style channels: %d of %d", done, total)

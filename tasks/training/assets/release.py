"""From a training checkpoint to a bundled generator: weights, statistics, samples, model card.

The folder is all that the rest of the program needs to know of a generator. Replacing one is
running this again and training its encoder anew, since both carry the generator's hash.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.load import load_generator
from models.checkpoints.native import save_generator
from models.errors import ConfigError
from models.losses.frechet import FrechetFeatures, frechet_distance
from models.losses.perceptual import load_perceptual
from models.statistics import compute_statistics, save_statistics
from models.stylegan2.generator import Generator, weights_hash
from tasks.training.assets.judge import Judge
from tasks.training.data import load_pictures
from tasks.training.generator import save_samples

SAMPLES = 10_000
"""Samples of W for all statistics but the anchors."""


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """What to release and what its card should say."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    checkpoint: str
    """checkpoint.pt of `refinery train generator`; its moving average is released."""
    out: str
    """Folder of the bundle, e.g. models/assets/faces64."""
    data: tuple[str, ...]
    """The training pictures, for the scores."""
    held_out: tuple[str, ...]
    """Pictures that were not trained on, for the scores."""
    terms: str
    """Under which terms the weights may be used."""
    data_note: str
    """What the pictures are and where they come from."""
    training_note: str = ""
    """How it was trained: machine, phases."""
    judge: str | None = None
    """File of SqueezeNet v1.1 (ImageNet), for scores by a network that no loss saw."""
    frechet_images: int = 5_000
    """Samples for the Frechet trunk distance."""
    anchor_samples: int = 100_000
    """Samples of W for LSAP's anchors, at least `SAMPLES`."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.anchor_samples < SAMPLES:
            raise ConfigError(
                f"anchor_samples: expected at least {SAMPLES}, of which the other statistics are "
                f"made, got {self.anchor_samples}"
            )


def fit(config: ReleaseConfig) -> Path:
    """Write generator.safetensors + .json, statistics.safetensors, samples.png and MODEL_CARD.md.

    Returns:
        The folder.

    Raises:
        AssetError: the checkpoint or the pictures cannot be read.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(config.checkpoint, map_location="cpu", weights_only=True)
    generator = load_generator(config.checkpoint)
    generator.latent_avg.copy_(_mean_of_w(generator, config))
    settings = json.loads(saved["config"])
    provenance = {
        "trained_by": "refinery train generator",
        "images_shown": saved["images"],
        "settings": {key: settings[key] for key in _TOLD},
        "data": config.data_note,
        "note": config.training_note,
    }
    path = out / "generator.safetensors"
    save_generator(
        generator, path, {"terms": config.terms, "provenance": provenance}, torch.float16
    )
    # From here on the stored values count, not those of the checkpoint.
    generator = load_generator(path)
    statistics = compute_statistics(
        generator, SAMPLES, seed=config.seed, anchor_samples=config.anchor_samples
    )
    save_statistics(statistics, out / "statistics.safetensors")
    save_samples(generator, out / "samples.png")
    _save_discriminator(saved, out / "discriminator.safetensors")
    scores = _scores(generator, config)
    card = json.loads((out / "generator.json").read_text())
    card["scores"] = scores
    (out / "generator.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "MODEL_CARD.md").write_text(_model_card(out.name, generator, card, config))
    return out


_TOLD = (
    "resolution",
    "widths",
    "batch",
    "learning_rate",
    "r1_gamma",
    "r1_interval",
    "path_length_weight",
    "path_length_interval",
    "mixing_probability",
    "ema_half_life",
    "ada_target",
    "ada_images",
    "precision",
    "loss",
    "has_noise",
    "seed",
)


@torch.no_grad()
def _mean_of_w(generator: Generator, config: ReleaseConfig) -> Tensor:
    rng = torch.Generator().manual_seed(config.seed)
    total = torch.zeros(generator.w_dim, dtype=torch.float64)
    for _ in range(100):
        z = torch.randn(1000, generator.z_dim, generator=rng)
        total += generator.mapping(z)[:, 0].double().sum(0)
    return (total / 100_000).float()


@torch.no_grad()
def _scores(generator: Generator, config: ReleaseConfig) -> dict[str, float]:
    """Distances to the data, each beside what real pictures reach."""
    features = FrechetFeatures()
    train = load_pictures(config.data, generator.resolution)
    held_out = load_pictures(config.held_out, generator.resolution)
    rng = torch.Generator().manual_seed(config.seed + 1)
    codes = torch.randn(config.frechet_images, generator.z_dim, generator=rng).split(50)
    samples = torch.cat([generator.synthesis(generator.mapping(z)).clamp(-1, 1) for z in codes])
    of_train = features.moments(_images(train))
    count = len(held_out)
    part = features.moments([samples[at : at + 50] for at in range(0, count, 50)])
    judged = _judged(samples, train, config)
    nearest_sample = _nearest(samples[:100], train)
    nearest_held_out = _nearest(torch.cat(list(_images(held_out)))[:100], train)
    return {
        f"frechet_trunk_distance_{config.frechet_images}": frechet_distance(
            features.moments(samples.split(50)), of_train
        ),
        f"frechet_trunk_distance_first_{count}": frechet_distance(part, of_train),
        f"frechet_trunk_distance_{count}_held_out_real": frechet_distance(
            features.moments(_images(held_out)), of_train
        ),
        **judged,
        "nearest_training_picture_of_sample": nearest_sample,
        "nearest_training_picture_of_held_out_real": nearest_held_out,
    }


def _judged(samples: Tensor, train: Tensor, config: ReleaseConfig) -> dict[str, float]:
    """Samples against one half of the training pictures, beside the other half against it."""
    if config.judge is None:
        return {}
    judge = Judge(config.judge)
    rng = torch.Generator().manual_seed(config.seed)
    real = judge.features(
        torch.cat(list(_images(train[torch.randperm(len(train), generator=rng)])))
    )
    first, second = real.chunk(2)
    found = {}
    for suffix, features in (
        ("", judge.features(samples[: len(first)])),
        ("_of_real_halves", first),
    ):
        verdict = asdict(judge.verdict(features, second))
        found |= {f"squeezenet_{name}{suffix}": value for name, value in verdict.items()}
    return found


def _save_discriminator(saved: dict[str, Any], path: Path) -> None:
    """Kept in half precision: who goes on training needs the judge that knows this generator."""
    state = {name: value.half().contiguous() for name, value in saved["d"].items()}
    settings = json.loads(saved["config"])
    widths = {k: v for k, v in settings["widths"].items() if int(k) <= settings["resolution"]}
    about = {"resolution": str(settings["resolution"]), "widths": json.dumps(widths)}
    save_file(state, path, metadata=about)


def _nearest(images: Tensor, train: Tensor) -> float:
    """Median trunk distance of pictures to the nearest training picture (by pixels) or its mirror.

    Samples that were much closer to training pictures than unseen pictures are would be copies.
    """
    perceptual = load_perceptual("refinery")
    pool = torch.cat(list(_images(train)))
    pool = torch.cat([pool, pool.flip(3)])
    small = torch.nn.functional.avg_pool2d(pool, 4).flatten(1)
    mine = torch.nn.functional.avg_pool2d(images, 4).flatten(1)
    closest = torch.cdist(mine, small).argmin(1)
    return float(perceptual(images, pool[closest]).median())


def _images(pictures: Tensor) -> Iterator[Tensor]:
    for part in pictures.split(50):
        yield part.float().div_(127.5).sub_(1)


def _model_card(
    name: str, generator: Generator, card: dict[str, Any], config: ReleaseConfig
) -> str:
    arch = generator.architecture
    parameters = sum(p.numel() for p in generator.parameters())
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in card["scores"].items())
    widths = ", ".join(f"{res}: {width}" for res, width in arch.widths.items())
    return f"""# {name}

A StyleGAN2 generator of {arch.resolution} px pictures. {parameters / 1e6:.2f} M parameters,
stored in half precision (`generator.safetensors`), computed in float32.

![samples from fixed seeds, no truncation](samples.png)

- **Data.** {config.data_note}
- **Terms.** {config.terms}
- **Images shown.** {card["provenance"]["images_shown"]:,}. {config.training_note}
- **Architecture.** z and w of {arch.w_dim}, {arch.mapping_layers} mapping layers,
  widths {{{widths}}}.
- **Hash of the values.** `{weights_hash(generator)}`
- **Statistics.** `statistics.safetensors`: mean, PCA and radius of W and the style space from
  10,000 samples, LSAP's anchors from {config.anchor_samples:,}, the picture of the mean code.

| score | value |
|---|---|
{rows}

Frechet trunk distance has the formula of FID in the bundled perceptual trunk: it is not FID. The
row of real held-out pictures is what faces that were never shown reach with as few pictures, so it
is the floor for the row above it. The last two rows are medians of the trunk distance to the
nearest training picture (and its mirror): samples that were copies would be far below unseen
pictures. Rows of SqueezeNet are by ImageNet features that no loss saw (128 px, averaged over
places): Frechet distance, precision and recall (k = 3), and what two halves of the training
pictures have to each other.

`discriminator.safetensors` is the discriminator of the same moment: to go on training, start from
both.

Made by `refinery train release`.
"""

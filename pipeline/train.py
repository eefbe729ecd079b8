"""Training from a TOML config: the plain `fit`, here or on several GPUs by Ray Train."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.errors import ConfigError, RefineryError
from pipeline.config import load_dataclass, nearest
from pipeline.faults import causes
from pipeline.ray_session import ray_session

FITS = {
    "generator": ("tasks.training.generator", "FitGeneratorConfig"),
    "e4e": ("tasks.training.encoder", "FitEncoderConfig"),
    "psp": ("tasks.training.encoder", "FitPspConfig"),
    "restyle": ("tasks.training.encoder", "FitRestyleConfig"),
    "w-encoder": ("tasks.training.encoder", "FitWEncoderConfig"),
    "lsap": ("tasks.training.encoder", "FitLsapConfig"),
    "cycle": ("tasks.training.encoder", "FitCycleConfig"),
    "clcae-align": ("tasks.training.clcae_align", "FitClcaeAlignConfig"),
    "clcae": ("tasks.training.clcae", "FitClcaeConfig"),
    "refine": ("tasks.training.refine", "FitRefineConfig"),
    "clip": ("tasks.training.assets.clip", "FitClipConfig"),
    "attributes": ("tasks.training.assets.attributes", "FitAttributesConfig"),
    "trunk": ("tasks.training.assets.trunk", "FitTrunkConfig"),
    "release": ("tasks.training.assets.release", "ReleaseConfig"),
}
"""What to make -> module with `fit`, and its config."""
DISTRIBUTED = ("generator",)
"""Those whose `fit` averages gradients over processes."""


def train(what: str, path: str | None, sets: Sequence[str], workers: int = 1) -> Any:
    """Train one network to the end of its config, resuming what its `out` folder holds.

    Args:
        what: a name of `FITS`.
        path: TOML file with the fields of the fit's config.
        workers: processes; more than one needs a `fit` that averages gradients.

    Returns:
        What `fit` returns; with several workers, the folder `out`.

    Raises:
        ConfigError: no such network, a wrong key or value, or one that trains on one process only.
    """
    if what not in FITS:
        known = ", ".join(sorted([*FITS, "all"]))
        raise ConfigError(f"train {what}: unknown; {nearest(what, [*FITS, 'all'])} (of {known})")
    module, config_name = FITS[what]
    if workers < 1 or (workers > 1 and what not in DISTRIBUTED):
        raise ConfigError(
            f"--workers {workers}: train {what} runs on "
            f"{'1 or more processes' if what in DISTRIBUTED else 'one process'}"
        )
    config = load_dataclass(getattr(importlib.import_module(module), config_name), path, sets)
    if workers == 1:
        fit: Callable[[Any], Any] = importlib.import_module(module).fit
        return fit(config)
    return _train_on_ray(module, config, workers)


def _train_on_ray(module: str, config: Any, workers: int) -> Path:
    out = str(Path(config.out).absolute())
    config = dataclasses.replace(config, out=out)
    with ray_session():
        import ray
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        use_gpu = config.device != "cpu"
        gpus = ray.cluster_resources().get("GPU", 0)
        if use_gpu and gpus < workers:
            raise ConfigError(
                f"--workers {workers}: the cluster has {gpus:g} GPUs; lower --workers or set "
                "device=cpu"
            )
        trainer = TorchTrainer(
            _fit_on_worker,
            train_loop_config={"module": module, "config": config},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(name="refinery-train", storage_path=str(Path(out, "ray"))),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _reason(error) from error
    return Path(out)


def _reason(error: Exception) -> RefineryError:
    """What the first failed worker said."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        for cause in causes(failure):
            if isinstance(cause, RefineryError):
                return cause
        return RefineryError(f"training failed on worker {rank}: {failure}")
    return RefineryError(f"training failed: {error}")


def _fit_on_worker(loop_config: dict[str, Any]) -> None:
    """One process of the group: Ray Train has set up torch.distributed before it calls this."""
    config = loop_config["config"]
    if config.device != "cpu":
        from ray.train.torch import get_device

        config = dataclasses.replace(config, device=str(get_device()))
    importlib.import_module(loop_config["module"]).fit(config)

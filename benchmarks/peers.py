"""Other people's programs beside ours: the same weights, equal outputs, then CPU time in turn.

Run: python -m benchmarks.peers --peers FOLDER [--resolution 256] [--batches 1] [--rounds 3]

FOLDER holds checkouts by the names of their repositories, of which any may be missing:
NVlabs/stylegan2-ada-pytorch, rosinality/stylegan2-pytorch, danielroich/PTI,
omertov/encoder4editing. The weights are a random network of stylegan2-ada with the official widths,
pickled by it and read by our loader; the encoder's are e4e's own. Their CUDA extensions are not
built: on a CPU each runs its own fallback. PTI is its whole loop, with our perceptual network in
the place of LPIPS, whose backbone is a download.
"""

import argparse
import json
import pickle
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.stages import milliseconds
from models.checkpoints.load import load_generator
from models.checkpoints.rosinality import save_rosinality
from models.encoders.checkpoint import load_encoder
from models.inversion.base import Inversion, SampleRng
from models.inversion.pti import Pti, PtiConfig
from models.losses.perceptual import load_perceptual
from models.losses.torchvision_shim import ensure_torchvision
from models.stylegan2.generator import Generator
from tasks.benchmark.machine import describe_machine

ADA, ROSINALITY, PTI, E4E = "stylegan2-ada-pytorch", "stylegan2-pytorch", "PTI", "encoder4editing"
TOLERANCE = 1e-4
"""Largest difference of two outputs, over the largest value of theirs."""
TUNED_TOLERANCE = 0.02
"""RMS difference of two tuned pictures over what tuning changed: Adam turns rounding of a gradient
near zero into whole steps."""
PTI_STEPS = 4
BATCHES = (1,)
Row = dict[str, Any]
Task = Callable[[], Tensor]


@dataclass
class Program:
    """A checkout whose top-level modules are importable inside `with`, in the place of ours.

    Attributes:
        stubs: modules that it imports and this benchmark does not need, by name.
    """

    folder: Path
    stubs: Mapping[str, ModuleType] = field(default_factory=dict)
    loaded: dict[str, ModuleType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {path.stem for path in self.folder.iterdir() if not path.name.startswith(".")}
        self.names = found | set(self.stubs)
        self.loaded |= self.stubs

    @contextmanager
    def imported(self) -> Iterator[None]:
        outside = {name: module for name, module in sys.modules.items() if self._is_its(name)}
        for name in outside:
            del sys.modules[name]
        sys.modules.update(self.loaded)
        sys.path.insert(0, str(self.folder))
        try:
            # The extensions are CUDA's: nothing is compiled.
            with mock.patch("torch.utils.cpp_extension.load", return_value=None):
                yield
        finally:
            sys.path.remove(str(self.folder))
            self.loaded = {name: sys.modules.pop(name) for name in list(sys.modules)
                           if self._is_its(name)}  # fmt: skip
            sys.modules.update(outside)

    def _is_its(self, name: str) -> bool:
        return name.partition(".")[0] in self.names

    def commit(self) -> str:
        command = ["git", "-C", str(self.folder), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or "unknown commit"


def measured(
    what: str, peer: str, ours: Mapping[str, Task], theirs: Task, rounds: int
) -> list[Row]:
    """A row for every form of ours, after the outputs of the exact one were seen to be equal.

    Raises:
        RuntimeError: they are not.
    """
    expected = theirs()
    largest = float(expected.abs().max())
    errors = {form: float((task() - expected).abs().max()) / largest for form, task in ours.items()}
    if not errors["float32"] <= TOLERANCE:
        raise RuntimeError(f"{what}: differs from {peer} by {errors['float32']:.1e}")
    times = milliseconds({**ours, "theirs": theirs}, rounds)
    return [_row(what, peer, form, (times[form], times["theirs"]), errors[form]) for form in ours]


def _row(what: str, peer: str, form: str, times: tuple[float, float], difference: float) -> Row:
    ours, theirs = times
    sys.stderr.write(f"{what}, {form}: {ours:.0f} ms, {peer} {theirs:.0f} ms\n")
    return {
        "what": what,
        "peer": peer,
        "form": form,
        "ours_ms": ours,
        "theirs_ms": theirs,
        "ratio": theirs / ours,
        "difference": difference,
    }


# ---------------------------------------------------------------------- generators


def pickled_network(program: Program, resolution: int, path: Path) -> nn.Module:
    """A random network of stylegan2-ada with noise and biases, pickled by it into `path`."""
    with program.imported():
        from training.networks import (  # type: ignore[import-not-found]
            Generator as AdaGenerator,
        )

        torch.manual_seed(0)
        network = AdaGenerator(
            512, 0, 512, resolution, 3,
            mapping_kwargs={"num_layers": 8},
            synthesis_kwargs={"channel_base": 32768, "channel_max": 512},
        )  # fmt: skip
        network = network.eval().requires_grad_(False)
        for name, value in network.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(0.1)
            elif re.fullmatch(r"synthesis\.b\d+\.\w+\.bias", name):
                value.normal_(std=0.1)
        with path.open("wb") as file:
            pickle.dump({"G_ema": network}, file)
    return network


def rosinality_network(program: Program, generator: Generator, folder: Path) -> nn.Module:
    """Our generator in rosinality's own class, by the file that we write for it."""
    file = folder / "rosinality.pt"
    save_rosinality(generator, None, file)
    with program.imported():
        from model import Generator as Rosinality  # type: ignore[import-not-found]

        network = Rosinality(generator.resolution, 512, 8, channel_multiplier=2)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(saved["g_ema"])
    return network.eval().requires_grad_(False)


def renders(generator: Generator, network: nn.Module, name: str) -> dict[str, Any]:
    """By form and "theirs": what renders codes [N L D]."""

    def ours(dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
        def render(codes: Tensor) -> Tensor:
            generator.compute_dtype = dtype
            return generator.synthesis(codes)

        return render

    def rosinality(codes: Tensor) -> Tensor:
        return network([codes], input_is_latent=True, randomize_noise=False)[0]

    def ada(codes: Tensor) -> Tensor:
        return network.synthesis(codes, noise_mode="const", force_fp32=True)  # type: ignore[operator]

    return {
        "float32": ours(None),
        "bfloat16": ours(torch.bfloat16),
        "theirs": ada if name == ADA else rosinality,
    }


def generator_rows(
    generator: Generator, networks: Mapping[str, nn.Module], batches: Sequence[int], rounds: int
) -> list[Row]:
    """Forward, and one W+ step: forward, mean squared error, backward to the codes."""
    rows: list[Row] = []
    for batch in batches:
        codes = _codes(generator, batch, 1)
        target = generator.synthesis(_codes(generator, batch, 2)).clamp(-1, 1)
        for name, network in networks.items():
            found = renders(generator, network, name)

            def forward(render: Callable[[Tensor], Tensor], codes: Tensor = codes) -> Tensor:
                with torch.inference_mode():
                    return render(codes)

            def step(
                render: Callable[[Tensor], Tensor], codes: Tensor = codes, target: Tensor = target
            ) -> Tensor:
                moving = codes.clone().requires_grad_()
                (render(moving) - target).square().mean((1, 2, 3)).sum().backward()
                assert moving.grad is not None
                return moving.grad

            for what, task in (("forward", forward), ("W+ step", step)):
                tasks = {form: _bound(task, render) for form, render in found.items()}
                theirs = tasks.pop("theirs")
                label = f"{what}, {generator.resolution} px, batch {batch}"
                rows += measured(label, name, tasks, theirs, rounds)
    return rows


def _bound(task: Callable[[Any], Tensor], argument: Any) -> Callable[[], Tensor]:
    return lambda: task(argument)


def _codes(generator: Generator, batch: int, seed: int) -> Tensor:
    z = torch.randn(batch, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return generator.mapping(z)


# ---------------------------------------------------------------------- encoder


def encoder_rows(program: Program, folder: Path, batches: Sequence[int], rounds: int) -> list[Row]:
    """e4e's forward pass at its 256 px, for a generator of 1024 px (18 rows)."""
    with program.imported():
        from models.encoders.psp_encoders import (  # type: ignore[import-not-found]
            Encoder4Editing,
        )

        torch.manual_seed(1)
        theirs = Encoder4Editing(50, "ir_se", Namespace(stylegan_size=1024)).eval()
    theirs.requires_grad_(False)
    # Their default initialisation gives codes of 1e-3; a batch at 256 px settles its statistics.
    images = torch.randn(4, 3, 256, 256, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    theirs.train()(images)
    theirs.eval()
    file = folder / "e4e.pt"
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in theirs.state_dict().items()}}, file)
    ours = load_encoder(file, 18, 512).encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows: list[Row] = []
    for batch in batches:
        pictures = images.repeat(2, 1, 1, 1)[:batch]
        ordered = pictures.contiguous(memory_format=torch.channels_last)

        @torch.inference_mode()
        def exact(ordered: Tensor = ordered) -> Tensor:
            return ours(ordered)

        @torch.inference_mode()
        def half(ordered: Tensor = ordered) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return ours(ordered).float()

        @torch.inference_mode()
        def peer(pictures: Tensor = pictures) -> Tensor:
            return theirs(pictures)

        forms = {"float32": exact, "bfloat16": half}
        rows += measured(f"e4e forward, 256 px, batch {batch}", E4E, forms, peer, rounds)
    return rows


# ---------------------------------------------------------------------- pivotal tuning


class _Distance(nn.Module):
    """Our perceptual distance behind LPIPS's face."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.perceptual = load_perceptual("refinery")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.perceptual(a, b)


def _stubs() -> dict[str, ModuleType]:
    """What PTI imports for logs and plots, and LPIPS."""
    names = ("wandb", "matplotlib", "matplotlib.pyplot", "lpips", "tqdm")
    found = {name: ModuleType(name) for name in names}
    found["lpips"].LPIPS = _Distance  # type: ignore[attr-defined]
    found["tqdm"].tqdm = lambda items: items  # type: ignore[attr-defined]
    found["matplotlib"].use = lambda _: None  # type: ignore[attr-defined]
    return found


def pti_rows(program: Program, generator: Generator, network: Path, rounds: int) -> list[Row]:
    """A step of PTI's own loop beside ours: the difference of two lengths, files and set-up out.

    Raises:
        RuntimeError: the tuned generators' pictures differ.
    """
    ensure_torchvision()
    pivot, other = _codes(generator, 1, 1), _codes(generator, 1, 2)
    before, target = (generator.synthesis(codes).clamp(-1, 1) for codes in (pivot, other))
    rendered: dict[str, Tensor] = {}
    work = network.parent / "pti"
    work.mkdir()

    def theirs(steps: int) -> Callable[[], None]:
        def task() -> None:
            with program.imported():
                coach = _coach(network, work, steps, pivot, target)
                coach.train()
                with torch.no_grad():
                    rendered["theirs"] = coach.forward(pivot)

        return task

    def ours(steps: int) -> Callable[[], None]:
        config = PtiConfig(
            steps=steps, stop_perceptual=0.0, locality_weight=0.0, perceptual="refinery"
        )
        method, start = Pti(generator, config), Inversion(w_plus=pivot)

        def task() -> None:
            found = method.invert(target, start, SampleRng([0]))
            rendered["ours"] = found.render(generator)

        return task

    lengths = (1, 1 + PTI_STEPS)
    generator.compute_dtype = None
    tasks = {f"{who.__name__} {n}": who(n) for who in (ours, theirs) for n in lengths}
    tasks[f"ours {lengths[1]}"]()
    tasks[f"theirs {lengths[1]}"]()
    moved = (rendered["theirs"] - before).square().mean().sqrt()
    difference = float((rendered["ours"] - rendered["theirs"]).square().mean().sqrt() / moved)
    if not difference <= TUNED_TOLERANCE:
        raise RuntimeError(f"tuned pictures differ from PTI's by {difference:.1e} of the change")
    times = milliseconds(tasks, rounds)
    step = {
        who: (times[f"{who} {lengths[1]}"] - times[f"{who} {lengths[0]}"]) / PTI_STEPS
        for who in ("ours", "theirs")
    }
    what = f"PTI step, {generator.resolution} px"
    return [_row(what, PTI, "float32", (step["ours"], step["theirs"]), difference)]


def _coach(network: Path, work: Path, steps: int, pivot: Tensor, target: Tensor) -> Any:
    """PTI's coach for one picture whose pivot is known; called inside `Program.imported`."""
    from configs import (  # type: ignore[import-not-found]
        global_config,
        hyperparameters,
        paths_config,
    )

    global_config.device = "cpu"
    hyperparameters.max_pti_steps, hyperparameters.LPIPS_value_threshold = steps, -1.0
    hyperparameters.use_last_w_pivots = True
    hyperparameters.max_images_to_invert = 2
    paths_config.stylegan2_ada_ffhq = str(network)
    paths_config.checkpoints_dir = paths_config.embedding_base_dir = str(work)
    from training.coaches.single_id_coach import (  # type: ignore[import-not-found]
        SingleIDCoach,
    )

    coach = SingleIDCoach([(["picture"], target)], False)
    coach.w_pivots["picture"] = pivot
    return coach


# ---------------------------------------------------------------------- all


def compare(peers: Path, resolution: int, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Every row that the checkouts in `peers` allow, on one thread.

    Raises:
        FileNotFoundError: stylegan2-ada is missing: the weights are made by it.
    """
    if not (peers / ADA).is_dir():
        raise FileNotFoundError(
            f"{peers / ADA}: no such folder; clone NVlabs/{ADA} there, its network is the one that "
            "all programs get"
        )
    torch.set_num_threads(1)
    programs = {
        name: Program(peers / name, _stubs() if name == PTI else {})
        for name in (ADA, ROSINALITY, E4E, PTI)
        if (peers / name).is_dir()
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = folder / "network.pkl"
        networks = {ADA: pickled_network(programs[ADA], resolution, network)}
        generator = load_generator(network)
        if ROSINALITY in programs:
            networks[ROSINALITY] = rosinality_network(programs[ROSINALITY], generator, folder)
        rows += generator_rows(generator, networks, batches, rounds)
        if E4E in programs:
            rows += encoder_rows(programs[E4E], folder, batches, rounds)
        if PTI in programs:
            rows += pti_rows(programs[PTI], generator, network, rounds)
    return {
        "machine": describe_machine(),
        "commits": {name: program.commit() for name, program in programs.items()},
        "rounds": rounds,
        "rows": rows,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = compare(args.peers, args.resolution, args.batches, args.rounds)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

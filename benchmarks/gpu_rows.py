"""What `make bench-gpu` measures: the tasks of each group of rows, their clock and their errors.

A group times its tasks interleaved, so that their ratios come from one stretch of time. A task that
fails leaves its message in its row.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthesis import WIDTHS_F, make_residual
from models.checkpoints.load import load_generator
from models.encoders.checkpoint import build_encoder
from models.encoders.psp import EncoderArchitecture
from models.inversion.base import Inversion, SampleRng
from models.inversion.e4e import E4e, E4eConfig
from models.inversion.pti import Pti, PtiConfig
from models.inversion.refine_opt import RefineOpt, RefineOptConfig, _TokenSearch
from models.inversion.row_search import RowSearch
from models.inversion.wplus import WPlus, WPlusConfig, _Search
from models.stylegan2.generator import Generator, GeneratorArchitecture

Row = dict[str, Any]
Task = Callable[[], Tensor]

PRECISIONS: dict[str, tuple[torch.dtype | None, bool]] = {
    "fp32": (None, False),
    "tf32": (None, True),
    "bf16": (torch.bfloat16, False),
    "bf16 + tf32": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
}
"""Type of the generator's convolutions (None: float32), and whether float32 products are TF32."""

BASIC = ("fp32", "tf32", "bf16", "fp16")
SEARCHED = ("fp32", "tf32", "bf16", "bf16 + tf32")
ENCODED = ("fp32", "tf32", "bf16")

PLANS = 4
"""How many of its algorithms cuDNN tries for a convolution, the most promising by its own guess."""

STEPS = 1000
"""Length of a search's schedule."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured on a kind of machine.

    Attributes:
        batches: by resolution of the generator, px.
        widest: most channels of a generator's layer (config f has 512).
        step_resolution, step_batches: of the W+ step; the latter's middle one stands for all.
        refine_batch: of refine_opt's step.
        encoder: architecture of the encoder with random weights.
        encoder_batches: of that encoder, and of the bundled one at 64 px.
        copied, product: bytes of the copy and side of the matrix product that give the ceilings.
        is_compiled: whether compiled forms are measured (minutes on a slow machine).
        rounds, window: how often a task is timed, and for how many seconds about.
    """

    batches: Mapping[int, Sequence[int]]
    widest: int = 512
    step_resolution: int
    step_batches: Sequence[int]
    refine_batch: int
    encoder: EncoderArchitecture
    encoder_batches: tuple[Sequence[int], Sequence[int]]
    copied: int
    product: int
    is_compiled: bool = True
    rounds: int = 5
    window: float = 0.05


GPU = Sizes(
    batches={256: (8, 1, 32, 64), 512: (8, 1, 32), 1024: (8, 1, 16)},
    step_resolution=256,
    step_batches=(1, 8, 32),
    refine_batch=16,
    encoder=EncoderArchitecture(num_ws=14),
    encoder_batches=((8, 32), (64, 256)),
    copied=1 << 30,
    product=8192,
)
CPU = Sizes(
    batches={64: (4, 1), 128: (4, 1)},
    step_resolution=64,
    step_batches=(1, 2, 4),
    refine_batch=4,
    encoder=EncoderArchitecture(num_ws=14, input_size=64),
    encoder_batches=((4,), (16,)),
    copied=1 << 27,
    product=1024,
    rounds=3,
)
QUICK = Sizes(
    batches={32: (2, 1)},
    widest=16,
    step_resolution=32,
    step_batches=(1, 2, 3),
    refine_batch=2,
    encoder=EncoderArchitecture(
        num_ws=8, input_size=32, width=8, units=(1, 1, 1, 1), head_width=16
    ),
    encoder_batches=((2,), (2,)),
    copied=1 << 20,
    product=64,
    is_compiled=False,
    rounds=2,
    window=0.002,
)


def message(error: BaseException) -> str:
    """One line of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class Bench:
    """Device, sizes and clock of a run."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.is_cuda = device.type == "cuda"
        self.generator = cache(self._make_generator)

    # ------------------------------------------------------------------ inputs

    def _make_generator(self, resolution: int) -> Generator:
        """Config f with random weights, biases and noise; its pictures have an RMS of 0.5."""
        torch.manual_seed(0)
        widths = {r: min(w, self.sizes.widest) for r, w in WIDTHS_F.items() if r <= resolution}
        generator = Generator(GeneratorArchitecture(resolution=resolution, widths=widths))
        generator.eval().requires_grad_(False)
        for index in range(generator.num_convs):
            layer = generator.conv(index)
            layer.noise.weight.fill_(0.1)
            layer.activate.bias.normal_(std=0.1)
        samples = generator.mapping(torch.randn(1000, generator.z_dim))
        generator.latent_avg.copy_(samples[:, 0].mean(0))
        self.set(generator, "fp32", "eager")
        w_plus = generator.mapping(torch.randn(1, generator.z_dim))
        rms = generator.to(self.device).synthesis(w_plus.to(self.device)).square().mean().sqrt()
        for to_rgb in (generator.to_rgb1, *generator.to_rgbs):  # the picture is linear in them
            to_rgb.conv.weight.mul_(0.5 / rms)  # type: ignore[union-attr, operator]
        return generator

    def codes(self, generator: Generator, batch: int, seed: int = 1) -> Tensor:
        """[N L D] of the mapping network; the same on every machine but for rounding."""
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(batch, generator.z_dim, generator=rng).to(self.device)
        with torch.no_grad():
            return generator.mapping(z)

    def pictures(self, generator: Generator, batch: int) -> Tensor:
        """Targets of a search: renders of other codes, in float32."""
        self.set(generator, "fp32", "eager")
        with torch.no_grad():
            return generator.synthesis(self.codes(generator, batch, seed=2)).clamp(-1, 1)

    # ------------------------------------------------------------------ forms

    def forms(self, precisions: Sequence[str], modes: Sequence[str]) -> list[tuple[str, str]]:
        """Every pair that the device has: a CPU has no TF32, no fast fp16, no CUDA graphs."""
        gpu_only = ("tf32", "fp16", "graph", "deterministic")
        return [
            (precision, mode)
            for precision, mode in itertools.product(precisions, modes)
            if self.is_cuda or not any(word in f"{precision}, {mode}" for word in gpu_only)
        ]

    def set(self, generator: Generator | None, precision: str, mode: str) -> None:
        """Put every switch where a form has it.

        Args:
            mode: words, of which "contiguous", "deterministic" and "grouped" are switches.
        """
        dtype, is_tf32 = PRECISIONS[precision]
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = is_tf32
        torch.backends.cudnn.deterministic = "deterministic" in mode
        torch.backends.cudnn.benchmark = "deterministic" not in mode
        torch.backends.cudnn.benchmark_limit = PLANS
        if generator is not None:
            generator.compute_dtype = dtype
            generator.memory_format = torch.contiguous_format if "contiguous" in mode else None
            generator.form = "grouped" if "grouped" in mode else "auto"

    def formed(self, task: Task, mode: str) -> Task:
        """The task compiled, as a CUDA graph, or as it is."""
        if "compile" in mode:
            torch.compiler.reset()
            return torch.compile(task, dynamic=False)
        return captured(task) if "graph" in mode else task

    def switched(
        self, task: Task, generator: Generator | None, precision: str, mode: str
    ) -> Callable[[], Task]:
        """What makes the task in one form; it puts every switch each time that it runs."""

        def make() -> Task:
            self.set(generator, precision, mode)
            formed = self.formed(task, mode)

            def run() -> Tensor:
                self.set(generator, precision, mode)
                return formed()

            return run

        return make

    # ------------------------------------------------------------------ clock

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give unused memory of the GPU back."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def timed(self, makers: Mapping[Any, Callable[[], Task]]) -> dict[Any, tuple[Task, Row]]:
        """Median seconds of every task and their spread, over rounds that run every task.

        A task is made and run twice before; one that fails has an `error` in its row instead.
        """
        found: dict[Any, tuple[Task, Row]] = {}
        times: dict[Any, list[float]] = {}

        def attempt(key: Any, step: Callable[[], object]) -> None:
            try:
                step()
            except Exception as error:
                times.pop(key, None)
                found[key] = _nothing, {"error": message(error)}
                self.release()

        def start(key: Any) -> None:
            found[key] = makers[key](), {}
            self.release()  # what a graph's warm-up left on a stream of its own
            found[key][0]()
            times[key] = [self._window(found[key][0], 1)]

        def measure(key: Any) -> None:
            first = times[key][0]
            # A slow task is timed less often.
            if first * len(times[key]) < 40 * self.sizes.window or len(times[key]) < 2:
                count = max(1, min(1000, int(self.sizes.window / first)))
                times[key].append(self._window(found[key][0], count))

        for key in makers:
            attempt(key, lambda key=key: start(key))
        for _ in range(self.sizes.rounds):
            for key in list(times):
                attempt(key, lambda key=key: measure(key))
        for key, (_, *values) in times.items():
            middle = statistics.median(values)
            spread = (max(values) - min(values)) / middle if len(values) > 1 else None
            found[key][1].update(seconds=middle, spread=spread, timed=len(values))
        return found

    def _window(self, task: Task, count: int) -> float:
        self.sync()
        started = time.perf_counter()
        for _ in range(count):
            task()
        self.sync()
        return (time.perf_counter() - started) / count

    def peak_mib(self, task: Task) -> float | None:
        """What one call of the task allocates on the GPU at most, above what was there."""
        if not self.is_cuda:
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def busy(self, task: Task, seconds: float, calls: int = 5) -> Row:
        """Time of the GPU's kernels over the time of a call that nobody watches, and the longest.

        Raises:
            RuntimeError: the profiler saw no kernel.
        """
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                task()
            self.sync()
        kernels = {
            event.key: event.self_device_time_total / 1e6 / calls
            for event in profile.key_averages()
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        }
        total = sum(kernels.values())
        if not total:
            raise RuntimeError("the profiler saw no kernel on this machine")
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:8]
        return {
            "busy": total / seconds,
            "kernels": {name: value / total for name, value in longest},
        }


def _nothing() -> Tensor:
    raise RuntimeError("this task could not be made")


def captured(task: Task) -> Task:
    """The task's replay as one CUDA graph; the result is the same tensor every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = task()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def errors(found: Tensor, exact: Tensor) -> Row:
    """Relative L2 error, and the largest difference."""
    difference = found.float() - exact
    return {
        "relative_error": float(difference.norm() / exact.norm()),
        "max_error": float(difference.abs().max()),
    }


# ---------------------------------------------------------------------- groups of rows


def ceilings(bench: Bench) -> list[Row]:
    """What the device can do at most: a copy inside its memory, and a product of matrices."""
    size, n = bench.sizes.copied, bench.sizes.product
    source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    makers: dict[str, Callable[[], Task]] = {"copy": lambda: lambda: target.copy_(source)}

    def product(precision: str) -> Callable[[], Task]:
        def make() -> Task:
            dtype = PRECISIONS[precision][0] or torch.float32
            a, b = torch.randn(2, n, n, device=bench.device).to(dtype)

            def task() -> Tensor:
                bench.set(None, precision, "eager")
                return a @ b

            return task

        return make

    makers |= {f"{n}^3 product, {p}": product(p) for p, _ in bench.forms(BASIC, [""])}
    rows = []
    for name, (_, row) in bench.timed(makers).items():
        if "seconds" in row:
            row["rate"] = (2 * size if name == "copy" else 2 * n**3) / row["seconds"]
        rows.append({"name": name, "unit": "B/s" if name == "copy" else "FLOP/s", **row})
    return rows


def synthesis(
    bench: Bench,
    resolution: int,
    batch: int,
    modes: Sequence[str],
    precisions: Sequence[str],
    watch: bool = False,
) -> list[Row]:
    """Pictures a second, and how far every form is from eager float32.

    Args:
        watch: profile every form, for the share of the time that the GPU is busy.
    """
    generator = bench.generator(resolution)
    w_plus = bench.codes(generator, batch)

    def task() -> Tensor:
        with torch.no_grad():
            return generator.synthesis(w_plus)

    def maker(precision: str, mode: str) -> Callable[[], Task]:
        return bench.switched(task, generator, precision, mode)

    timed = bench.timed({form: maker(*form) for form in bench.forms(precisions, modes)})
    bench.set(generator, "fp32", "eager")
    exact = task().clone()
    with FlopCounterMode(display=False) as counter:
        task()
    rows = []
    for (precision, mode), (formed, row) in timed.items():
        if "seconds" in row:
            _finish(bench, formed, row, (batch, mode), watch)
            row |= errors(formed(), exact)
            row["flop_per_s"] = counter.get_total_flops() / row["seconds"]
        rows.append(_labelled(resolution, batch, precision, mode) | row)
    return rows


def _finish(bench: Bench, task: Task, row: Row, form: tuple[int, str], watch: bool) -> None:
    """What every timed row has beside its seconds; `form` is the batch and the mode."""
    batch, mode = form
    row["images_per_s"] = batch / row["seconds"]
    row["peak_mib"] = None if "graph" in mode else bench.peak_mib(task)
    if watch:
        try:
            row |= bench.busy(task, row["seconds"])
        except Exception as error:
            row["busy_error"] = message(error)


def _labelled(resolution: int, batch: int, precision: str, mode: str) -> Row:
    return {"resolution": resolution, "batch": batch, "precision": precision, "mode": mode}


def residuals(bench: Bench, resolution: int, batch: int, rank: int = 4) -> list[Row]:
    """A different residual for every picture, beside none and beside the materialised twin."""
    generator = bench.generator(resolution)
    w_plus = bench.codes(generator, batch)
    torch.manual_seed(3)
    parts = {k: r.to(bench.device) for k, r in make_residual(generator, batch, rank).items()}

    def maker(precision: str, mode: str) -> Callable[[], Task]:
        def task() -> Tensor:
            bench.set(generator, precision, mode)
            with torch.no_grad():
                return generator.synthesis(w_plus, residual=None if "plain" in mode else parts)

        return lambda: task

    modes = ["plain", "refined", "refined, contiguous", "refined, grouped twin"]
    timed = bench.timed({form: maker(*form) for form in bench.forms(BASIC, modes)})
    exact = timed["fp32", "refined, grouped twin"][0]().clone()
    rows = []
    for (precision, mode), (task, row) in timed.items():
        if "seconds" in row:
            _finish(bench, task, row, (batch, mode), False)
            plain = timed[precision, "plain"][1].get("seconds")
            row["time / plain"] = row["seconds"] / plain if plain else None
            row |= {} if mode == "plain" else errors(task(), exact)
        rows.append(_labelled(resolution, batch, precision, mode) | {"rank": rank} | row)
    return rows


def search_step(
    bench: Bench,
    method: str,
    batch: int,
    modes: Sequence[str],
    precisions: Sequence[str],
    watch: bool = False,
) -> list[Row]:
    """One step of `wplus` or `refine_opt` with all its bookkeeping; the error is the gradient's.

    In the mode "graph", the loss and its gradient are one CUDA graph each, the rest runs as ever.
    """
    resolution = bench.sizes.step_resolution
    generator = bench.generator(resolution)
    images, start = bench.pictures(generator, batch), bench.codes(generator, batch)
    gradients: dict[Any, Tensor] = {}

    def maker(precision: str, mode: str) -> Callable[[], Task]:
        def make() -> Task:
            bench.set(generator, precision, mode)
            search = _search(method, generator, images, Inversion(w_plus=start))
            if "graph" in mode or "compile" in mode:
                _reform_loss(search, mode)
            tensors = [t.clone().requires_grad_() for t in search.adam.tensors]
            found = torch.autograd.grad(search.loss(tensors)[0].sum(), tensors)
            gradients[precision, mode] = torch.cat([g.flatten() for g in found])
            steps = itertools.count()

            def task() -> Tensor:
                bench.set(generator, precision, mode)
                search._step(next(steps) % STEPS)
                if len(search.rows) != batch:
                    raise RuntimeError(f"rows diverged: {search.failures}")
                return search.adam.tensors[0]

            return task

        return make

    timed = bench.timed({form: maker(*form) for form in bench.forms(precisions, modes)})
    if ("fp32", "eager") not in gradients:
        maker("fp32", "eager")()  # leaves its gradient there
    rows = []
    for form, (task, row) in timed.items():
        if "seconds" in row:
            _finish(bench, task, row, (batch, form[1]), watch)
            row |= errors(gradients[form], gradients["fp32", "eager"])
        rows.append({"method": method, **_labelled(resolution, batch, *form), **row})
    return rows


def _search(method: str, generator: Generator, images: Tensor, start: Inversion) -> RowSearch:
    rng = SampleRng(range(len(images)))
    if method == "wplus":
        config = WPlusConfig(steps=STEPS, perceptual="refinery", code_noise=0.0)
        wplus = WPlus(generator, config)
        wplus.picture_loss.to(images.device)
        return _Search(wplus, images, start, False, rng)
    refine = RefineOpt(generator, RefineOptConfig(steps=STEPS, perceptual="refinery"))
    refine.picture_loss.to(images.device)
    return _TokenSearch(refine, images, start, rng)


def _reform_loss(search: RowSearch, mode: str) -> None:
    loss = search.loss

    def flat(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return loss(list(tensors))

    if "compile" in mode:
        torch.compiler.reset()
        formed = torch.compile(flat, dynamic=False)
    else:
        samples = tuple(t.clone().requires_grad_() for t in search.adam.tensors)
        formed = torch.cuda.make_graphed_callables(flat, samples)
    search.loss = lambda tensors: formed(*tensors)  # type: ignore[method-assign]


def pti_step(bench: Bench, steps: int = 5) -> list[Row]:
    """A step of PTI without its locality term: the difference of two lengths of `invert`."""
    generator = bench.generator(bench.sizes.step_resolution)
    images, start = bench.pictures(generator, 1), Inversion(w_plus=bench.codes(generator, 1))

    def maker(precision: str, length: int) -> Callable[[], Task]:
        config = PtiConfig(
            steps=length, stop_perceptual=0.0, locality_weight=0.0, perceptual="refinery"
        )
        method = Pti(generator, config)

        def task() -> Tensor:
            bench.set(generator, precision, "eager")
            found = method.invert(images, start, SampleRng([0]))
            if found.failures:
                raise RuntimeError(found.failures[0])
            return found.w_plus

        return lambda: task

    names = [p for p, _ in bench.forms(ENCODED, ["eager"])]
    forms = itertools.product(names, (1, 1 + steps))
    timed = bench.timed({form: maker(*form) for form in forms})
    rows = []
    for precision in names:
        short, long = timed[precision, 1][1], timed[precision, 1 + steps][1]
        row = {**short, **long}
        if "error" not in row:
            row["seconds"] = (long["seconds"] - short["seconds"]) / steps
            row["images_per_s"] = 1 / row["seconds"]
        label = _labelled(generator.resolution, 1, precision, "eager")
        rows.append({"method": "pti", **label, **row})
    return rows


def encoder(
    bench: Bench, which: str, batch: int, modes: Sequence[str], watch: bool = False
) -> list[Row]:
    """Pictures a second of e4e's encoder; the error is the codes'.

    Args:
        which: "faces64", the bundled one, or "published", random weights of the published sizes.
    """
    network, offset = _encoder(bench, which)
    size = network.architecture.input_size
    rng = torch.Generator().manual_seed(4)
    images = torch.randn(batch, 3, size, size, generator=rng).clamp(-1, 1).to(bench.device)
    orders = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    ordered = {
        name: (copy.deepcopy(network).to(bench.device, memory_format=order), order)
        for name, order in orders.items()
    }

    def maker(precision: str, mode: str) -> Callable[[], Task]:
        dtype = PRECISIONS[precision][0]
        own, order = ordered["contiguous" if "contiguous" in mode else "channels-last"]

        def codes() -> Tensor:
            with torch.no_grad(), torch.autocast(bench.device.type, dtype, enabled=bool(dtype)):
                return own(images.contiguous(memory_format=order)).float() + offset

        return bench.switched(codes, None, precision, mode)

    timed = bench.timed({form: maker(*form) for form in bench.forms(ENCODED, modes)})
    exact = maker("fp32", "eager, contiguous")()().clone()
    rows = []
    for form, (task, row) in timed.items():
        if "seconds" in row:
            _finish(bench, task, row, (batch, form[1]), watch)
            row |= errors(task(), exact)
        rows.append({"encoder": which, **_labelled(size, batch, *form), **row})
    return rows


def _encoder(bench: Bench, which: str) -> tuple[Any, Tensor]:
    """The network in eval mode, and what is added to what it gives."""
    if which == "faces64":
        method = E4e(load_generator("faces64"), E4eConfig())
        return method.encoder, method.latent_avg.to(bench.device)
    torch.manual_seed(5)
    network = build_encoder(bench.sizes.encoder).eval().requires_grad_(False)
    return network, torch.zeros((), device=bench.device)

"""What a domain costs: rendering in it beside plain rendering, and a step of its adaptation.

Run: python -m benchmarks.domains [--batches 1 16] [--rounds 9]

CPU milliseconds of one thread, `faces64` with its bundled domains, tasks in turn and medians. One
domain for all pictures is how runs render. A step of `refinery adapt` is of domains that texts
guide, six codes each, all of one batch; validation and previews are left out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.stages import milliseconds
from models.adaptation.domain import add_domains, known_domains, load_domain
from models.checkpoints.load import load_generator
from models.inversion.base import Inversion
from tasks.adapt.config import AdaptConfig, DomainConfig
from tasks.adapt.job import _Job
from tasks.benchmark.machine import describe_machine
from tasks.work.device import prepare_device

BATCHES, ROUNDS = (1, 16), 9
TEXTS = ("pencil sketch", "oil painting", "cartoon", "watercolor painting")
CODES = 6
NEVER = 10**6


def renders(batches: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds a picture: plain, all in one domain, each in one of five."""
    generator = load_generator("faces64")
    domains = [load_domain(folder) for folder in known_domains(generator).values()]
    z = torch.randn(max(batches), generator.z_dim, generator=torch.Generator().manual_seed(0))
    w_plus = generator.mapping(z).detach()
    found = []
    for batch in batches:
        plain = Inversion(w_plus=w_plus[:batch])
        each = [[(domains[row % len(domains)], 1.0)] for row in range(batch)]
        drawn = {
            "plain": plain,
            "one": add_domains(plain, [[(domains[0], 1.0)]]),
            "each": add_domains(plain, each),
        }
        with torch.inference_mode():
            times = milliseconds(
                {k: partial(i.render, generator) for k, i in drawn.items()}, rounds
            )
        found.append({"batch": batch, **{name: t / batch for name, t in times.items()}})
    return found


def steps(rounds: int) -> dict[str, float]:
    """Milliseconds of a step of one domain and of as many as there are texts."""
    tasks = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, len(TEXTS)):
            config = AdaptConfig(
                domain=tuple(
                    DomainConfig(name=f"d{i}", guidance="text", target_text=text)
                    for i, text in enumerate(TEXTS[:count])
                ),
                generator="faces64",
                batch=CODES,
                steps=NEVER,
                validation_every=NEVER,
                preview_every=NEVER,
                threads=1,
                out=folder,
            )
            job = _Job(config)
            job.prepare()
            job.descent.advance()  # the first one validates
            tasks[str(count)] = job.descent.advance
        return milliseconds(tasks, rounds)


def run(batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Every figure, JSON-ready."""
    torch.set_num_threads(1)
    prepare_device("cpu")  # as workers do
    return {
        "machine": describe_machine(),
        "rounds": rounds,
        "renders": renders(batches, rounds),
        "steps": steps(rounds),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(run(args.batches, args.rounds), indent=2) + "\n")


if __name__ == "__main__":
    main()

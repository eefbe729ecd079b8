"""`python -m benchmarks.gpu --quick` on the CPU: its rows, their errors and its page."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_rows import QUICK, Bench

ROOT = Path(__file__).parents[2]


def run(out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", f"--out={out}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    page = run(out, "--quick")
    assert page == out.with_suffix(".md").read_text()
    return out


@pytest.fixture
def state(place: Path) -> dict[str, Any]:
    return json.loads(place.read_text())


def rows(state: dict[str, Any], group: str) -> dict[str, dict[str, Any]]:
    return {f"{r['precision']}, {r['mode']}": r for r in state["groups"][group]["rows"]}


@pytest.mark.slow
def test_every_group_has_rows(state: dict[str, Any]) -> None:
    assert set(state["groups"]) == {
        *(f"synthesis, 32 px, batch {batch}" for batch in (1, 2)),
        *(f"wplus, batch {batch}" for batch in (1, 2, 3)),
        *(f"e4e, {which}, batch 2" for which in ("published", "faces64")),
        *("ceilings", "residuals", "refine_opt, batch 2", "pti"),
    }
    for name, group in state["groups"].items():
        for row in group["rows"]:
            assert row["seconds"] > 0, (name, row)
    machine = state["machine"]
    assert machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__
    assert machine["command"].endswith("--quick")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "exact", "inexact"),
    [
        ("synthesis, 32 px, batch 2", "fp32, eager", "bf16, eager"),
        ("residuals", "fp32, refined, grouped twin", "bf16, refined"),
        ("wplus, batch 2", "fp32, eager", "bf16, eager"),
        ("refine_opt, batch 2", "fp32, eager", "bf16, eager"),
        ("e4e, published, batch 2", "fp32, eager, contiguous", "bf16, eager, contiguous"),
        ("e4e, faces64, batch 2", "fp32, eager, contiguous", "bf16, eager"),
    ],
)
def test_errors(state: dict[str, Any], group: str, exact: str, inexact: str) -> None:
    found = rows(state, group)
    assert found[exact]["relative_error"] == 0
    assert found[exact]["max_error"] == 0
    assert 0 < found[inexact]["relative_error"] < 0.1
    assert found[inexact]["max_error"] > 0


@pytest.mark.slow
def test_rates_are_those_of_the_times(state: dict[str, Any]) -> None:
    for group in ("synthesis, 32 px, batch 2", "wplus, batch 2", "residuals"):
        for row in rows(state, group).values():
            assert row["images_per_s"] == pytest.approx(2 / row["seconds"])
    copy, *products = state["groups"]["ceilings"]["rows"]
    assert copy["rate"] == pytest.approx(2 * 2**20 / copy["seconds"])
    assert products[0]["rate"] == pytest.approx(2 * 64**3 / products[0]["seconds"])


@pytest.mark.slow
def test_the_page_comes_from_the_json(place: Path, state: dict[str, Any]) -> None:
    page = place.with_suffix(".md")
    first = page.read_text()
    fast = rows(state, "synthesis, 32 px, batch 2")["bf16, eager"]
    fast["images_per_s"] = 123456.0
    state["groups"]["pti"]["rows"][1] = {"precision": "bf16", "mode": "eager", "error": "no room"}
    place.write_text(json.dumps(state))
    assert run(place, "--page-only") == page.read_text() != first
    assert page.read_text().count("123456") == 2  # in the table of batches, and in that of all
    assert "**No GPU here: smaller sizes, on the CPU.**" in first
    assert "Not measured" not in first
    assert "- pti, bf16, eager: no room" in page.read_text()


def test_a_row_that_fails_says_why_and_the_others_go_on() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("out of\nmemory")

    def unmade() -> Callable[[], torch.Tensor]:
        raise RuntimeError("out of\nmemory")

    timed = Bench(torch.device("cpu"), QUICK).timed(
        {"a": lambda: broken, "b": unmade, "c": lambda: lambda: torch.zeros(1)}
    )
    assert timed["a"][1] == timed["b"][1] == {"error": "RuntimeError: out of memory"}
    assert timed["c"][1]["seconds"] > 0


def test_a_group_that_fails_and_a_device_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fail() -> list[dict[str, Any]]:
        raise ValueError("no such layer")

    def succeed() -> list[dict[str, Any]]:
        done.append("c")
        return [{"seconds": 1.0}]

    monkeypatch.setattr(gpu, "groups", lambda bench: [("b", 0, fail), ("c", 0, succeed)])
    bench, state = Bench(torch.device("cpu"), QUICK), {"groups": {"a": {"rows": []}}}
    saved: list[set[str]] = []
    assert gpu.measure(bench, state, 60, lambda: saved.append(set(state["groups"])))
    assert state["groups"]["b"]["rows"] == [{"error": "ValueError: no such layer"}]
    assert (done, saved) == (["c"], [{"a", "b"}, {"a", "b", "c"}])

    state = {"groups": {}}
    assert gpu.measure(bench, state, 0, lambda: None)
    assert state["groups"]["c"]["rows"] == [{"error": "not measured: 0 s were left"}]
    assert done == ["c"]

    def stopped() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "sync", stopped)
    state = {"groups": {}}
    assert not gpu.measure(bench, state, 60, lambda: None)  # a new process goes on with "c"
    assert set(state["groups"]) == {"b"}

"""Other people's checkouts: their modules stay theirs, and outputs are compared before clocks."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.peers import ADA, Program, compare, measured


def test_a_program_has_its_own_modules_inside_and_leaves_ours_outside(tmp_path: Path) -> None:
    ours = importlib.import_module("models.errors")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "errors.py").write_text(
        "import logs\n"
        "from torch.utils.cpp_extension import load\n"
        "compiled = load('fused', sources=['missing.cpp'])\n"
        "count = 0\n"
    )
    logs = ModuleType("logs")
    program = Program(tmp_path, {"logs": logs})
    with program.imported():
        theirs = importlib.import_module("models.errors")
        theirs.count += 1
        assert theirs.logs is logs
        assert theirs.compiled is None  # no compiler was asked
    assert sys.modules["models.errors"] is ours
    assert "logs" not in sys.modules
    assert str(tmp_path) not in sys.path
    with program.imported():
        assert importlib.import_module("models.errors").count == 1  # the same, not once more
    with pytest.raises(KeyError), program.imported():
        raise KeyError
    assert importlib.import_module("models.errors") is ours


def test_what_differs_is_not_timed() -> None:
    def ours() -> torch.Tensor:
        return torch.tensor([1.0, 2.0])

    def near() -> torch.Tensor:
        return torch.tensor([1.0, 2.00001])

    def far() -> torch.Tensor:
        return torch.tensor([1.0, 2.1])

    rows = measured("a sum", "peer", {"float32": ours, "bfloat16": far}, near, rounds=1)
    assert [row["form"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["difference"] < 1e-4 < rows[1]["difference"]
    with pytest.raises(RuntimeError, match="a sum: differs from peer"):
        measured("a sum", "peer", {"float32": ours}, far, rounds=1)


def test_a_missing_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{ADA}: no such folder; clone"):
        compare(tmp_path, 32, [1], 1)

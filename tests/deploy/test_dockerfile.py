"""deploy/Dockerfile, read closely: a COPY without a source shows without a container engine."""

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@dataclass
class Stage:
    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, keyword: str) -> list[str]:
        return [value for found, value in self.steps if found == keyword]


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Global ARG defaults and the stages, in order."""
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        if not line.strip():
            continue
        keyword, value = line.strip().split(None, 1)
        if keyword == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
            stages.append(Stage(base, name))
        elif not stages:
            assert keyword == "ARG", f"{keyword} before the first FROM"
            name, _, default = value.partition("=")
            arguments[name] = default
        else:
            stages[-1].steps.append((keyword, value))
    return arguments, stages


ARGUMENTS, STAGES = parse(DOCKERFILE.read_text())
BY_NAME = {stage.name: stage for stage in STAGES}


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets a path into the build context (the last matching line decides)."""
    parents = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
    verdict = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            if any(fnmatch.fnmatch(p, pattern) for p in [*parents, path.rsplit("/", 1)[-1]]):
                verdict = line.startswith("!")
    return verdict


def chain(device: str) -> list[Stage]:
    """The stages that a build for one device goes through, from the last to the first."""
    stages, name = [], "build"
    while name in BY_NAME:
        stages.append(BY_NAME[name])
        name = BY_NAME[name].base.replace("${DEVICE}", device)
    assert name == "${PYTHON_IMAGE}"
    return stages


def test_both_devices_are_built_from_the_same_stages() -> None:
    assert ARGUMENTS["DEVICE"] == "gpu"
    for device in ("gpu", "cpu"):
        assert [s.name for s in chain(device)] == ["build", f"packages-{device}", "packages"]
    assert STAGES[-1].name == "runtime"
    assert STAGES[-1].base == "${PYTHON_IMAGE}"
    assert ARGUMENTS["PYTHON_IMAGE"].startswith("python:3.11")


@pytest.mark.parametrize("source", ["models", "tasks", "pipeline", "constraints.txt", "README.md"])
def test_package_is_copied(source: str) -> None:
    copied = {s for value in BY_NAME["build"].of("COPY") for s in value.split()[:-1]}
    assert source in copied


def test_every_copied_path_exists_and_is_in_the_context() -> None:
    checked = 0
    for stage in STAGES:
        for value in stage.of("COPY"):
            sources = [word for word in value.split()[:-1] if not word.startswith("--")]
            if "--from=" in value:
                assert re.search(r"--from=(\S+)", value)[1] in BY_NAME
                continue
            for source in sources:
                assert (ROOT / source).exists(), f"COPY {source}: no such file"
                assert is_in_context(source), f"COPY {source}: left out by .dockerignore"
                checked += 1
    assert checked >= 9


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "tests/conftest.py", "Makefile"]
)
def test_context_leaves_out(path: str) -> None:
    assert not is_in_context(path)


def test_every_install_goes_through_the_constraints() -> None:
    installs = [
        command
        for stage in STAGES
        for value in stage.of("RUN")
        for command in value.split("&&")
        if "pip install" in command
    ]
    assert len(installs) >= 5
    for command in installs:
        assert "--constraint constraints.txt" in command, command
        # Building the package itself is held to the pins, too.
        assert ("." not in command.split()[-1]) or "--build-constraint" in command, command


def test_image_runs_as_a_user_that_is_not_root() -> None:
    runtime = BY_NAME["runtime"]
    assert runtime.of("USER") == ["1000:1000"]
    assert [k for k, _ in runtime.steps].index("USER") > max(
        i for i, (k, _) in enumerate(runtime.steps) if k in {"RUN", "COPY"}
    )
    assert "--uid 1000" in runtime.of("RUN")[0]


def test_entrypoint_is_the_command_under_an_init() -> None:
    runtime = BY_NAME["runtime"]
    assert json.loads(runtime.of("ENTRYPOINT")[0]) == ["tini", "--", "refinery"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "refinery" in scripts
    assert "tini" in runtime.of("RUN")[0]
    # Operators of KubeRay before 1.6 probe pods with wget.
    assert "wget" in runtime.of("RUN")[0]


def test_nothing_reports_usage() -> None:
    environment = " ".join(BY_NAME["runtime"].of("ENV"))
    for setting in (
        "PREFECT_SERVER_ANALYTICS_ENABLED=false",
        "DO_NOT_TRACK=1",
        "RAY_USAGE_STATS_ENABLED=0",
    ):
        assert setting in environment


def test_data_files_of_the_packages_are_packaged() -> None:
    """An installed package has only the data files that pyproject.toml names."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("models", "tasks", "pipeline"):
        patterns = packages["package-data"].get(package, [])
        packaged = {p for pattern in patterns for p in (ROOT / package).glob(pattern)}
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                assert path in packaged, f"{path.relative_to(ROOT)} is not in package-data"
                checked = path
    assert checked.is_file()


def shell_lines() -> list[str]:
    return [value for stage in STAGES for value in stage.of("RUN")]


@pytest.mark.parametrize("line", shell_lines())
def test_shell_commands_are_sound(line: str) -> None:
    """What hadolint would say of these: syntax, cleaned package lists, no recommended packages."""
    script = re.sub(r"^--mount=\S+\s+", "", line)
    done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "apt-get install" in script:
        assert "--no-install-recommends" in script
        assert "rm -rf /var/lib/apt/lists/*" in script
        assert script.index("apt-get update") < script.index("apt-get install")
    assert "sudo" not in script
    assert not re.search(r"(curl|wget) .*\|\s*(ba)?sh", script)


def test_package_builds_in_the_order_of_the_dockerfile(tmp_path: Path) -> None:
    """The dependency layer builds an empty package; the real one must pick up nothing of it."""
    build = BY_NAME["build"]
    folders = build.of("WORKDIR")
    assert folders == ["/src"]
    assert BY_NAME["packages"].of("WORKDIR") == ["/deps"]
    order = [(k, v) for k, v in build.steps if k in {"WORKDIR", "RUN"}]
    assert "pip uninstall --yes style-refinery" in order[0][1]
    assert order[1][0] == "WORKDIR"
    assert "--no-deps" in order[2][1]
    # setuptools finds the packages from a bare copy of what the stage copies.
    for value in build.of("COPY"):
        *sources, _ = value.split()
        for source in sources:
            os.symlink(ROOT / source, tmp_path / source)
    script = (
        "from setuptools import find_packages; import tomllib;"
        "project = tomllib.load(open('pyproject.toml', 'rb'));"
        "print(*find_packages('.', **project['tool']['setuptools']['packages']['find']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not in this environment")
    assert {"models", "models.stylegan2", "tasks", "pipeline"} <= set(done.stdout.split())

"""The documents: links lead somewhere, commands parse, settings exist, the example method works."""

import json
import re
import shlex
import tomllib
import types
from pathlib import Path

import pytest
import torch

from models.inversion.base import Inversion, SampleRng
from models.stylegan2.generator import Generator
from pipeline.cli import app
from pipeline.config import load_config, validated
from tasks.directions.ways import WAYS
from tasks.training.assets.release import ReleaseConfig
from tasks.training.encoder import FitEncoderConfig
from tasks.training.generator import FitGeneratorConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
}
COMMANDS = [
    (page, line.split("  #")[0].strip())
    for page, text in PAGES.items()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("refinery ")
]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page}: {target}"


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page: str, command: str) -> None:
    _, name, *arguments = shlex.split(command.replace("[", "").replace("]", ""))
    found, _, _ = app.parse_args([name, *arguments], exit_on_error=False, print_error=False)
    is_group = name in ("benchmark", "directions")  # directions list: list_directions
    assert found.__name__.partition("_")[0] == (arguments[0] if is_group else name)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_in_backquotes_exist(page: str) -> None:
    folders = "models|tasks|pipeline|deploy|tests|benchmarks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", PAGES[page]):
        is_written_by_a_run = name.startswith("models/assets/")
        assert is_written_by_a_run or (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_show_what_came_out(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"execute_result"}
    assert all(cell["outputs"] for cell in cells)


def test_examples_of_directions_are_whole_configs() -> None:
    pattern = r"```toml\n# refinery directions fit (\w+) [^\n]*\n(.*?)```"
    blocks = re.findall(pattern, PAGES["docs/editing.md"], re.DOTALL)
    assert {way for way, _ in blocks} == set(WAYS)
    for way, text in blocks:
        validated(WAYS[way][0], tomllib.loads(text))


def test_settings_of_the_training_examples_exist() -> None:
    blocks = re.findall(r"```toml\n# (\w+)\.toml\n(.*?)```", PAGES["docs/training.md"], re.DOTALL)
    configs = {
        "faces": FitGeneratorConfig,
        "release": ReleaseConfig,
        "encoder": FitEncoderConfig,
    }
    assert [name for name, _ in blocks] == list(configs)
    for name, text in blocks:
        keys = re.findall(r"^(\w+) =", text, re.M)
        assert len(keys) > 3
        assert set(keys) <= set(configs[name].__dataclass_fields__), name


def test_settings_in_set_options_exist() -> None:
    for _, command in COMMANDS:
        if command.split()[1] in ("invert", "plan"):
            for key in re.findall(r"--set ([\w.]+)=", command):
                assert key.split(".")[0] in load_config().to_tables() | {"identity": None}, command


def test_the_example_method_keeps_the_contract(tiny_generator: Generator) -> None:
    (code,) = re.findall(r"```python\n(\"\"\".*?)```", PAGES["docs/adding-a-method.md"], re.DOTALL)
    module = types.ModuleType("truncate")
    exec(compile(code, "adding-a-method.md", "exec"), module.__dict__)
    images = torch.zeros(2, 3, 32, 32)
    w_plus = tiny_generator.mapping(torch.randn(2, tiny_generator.z_dim))

    method = module.Truncate(tiny_generator, module.TruncateConfig(psi=0.25))
    found = method.invert(images, Inversion(w_plus=w_plus), SampleRng([0, 1]))

    average = tiny_generator.latent_avg
    torch.testing.assert_close(found.w_plus, average + 0.25 * (w_plus - average))
    with pytest.raises(ValueError, match=r"psi must be in 0\.\.1, got 2"):
        module.TruncateConfig(psi=2)

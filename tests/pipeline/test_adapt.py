"""The config of an adaptation job: TOML, overrides, domains from the command line."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.adaptation.domain import Domain, add_domains, find_domain, save_domain, without_noise
from models.adaptation.token_sets import TokenSets
from models.checkpoints.load import load_generator
from models.checkpoints.native import save_generator
from models.errors import AssetError, ConfigError
from models.stylegan2.generator import Generator, GeneratorArchitecture, weights_hash
from pipeline.adapt import load_adapt_config
from pipeline.cli import app
from tests.conftest import make_tiny_generator

TOML = """\
steps = 300
rank = 2
layers = [1, 2]

[[clips]]
source = "refinery"
weight = 0.5

[[clips]]
source = "openai/clip-vit-base-patch32"

[[invert]]
name = "e4e"

[[invert]]
name = "wplus"
steps = 20

[input]
fit = "resize"

[[domain]]
name = "ink"
references = "photos/ink"
weights = { direction = 0.5 }

[[domain]]
name = "oil"
guidance = "text"
target_text = "oil painting of a face"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "adapt.toml"
    file.write_text(TOML)
    return str(file)


def test_references_of_all_tables(tmp_path: Path) -> None:
    file = tmp_path / "adapt.toml"
    file.write_text(
        'references = "all.parquet"\n'
        '[[domain]]\nname = "ink"\nstyle = "ink"\n'
        '[[domain]]\nname = "own"\nreferences = "own"\n'
        '[[domain]]\nname = "oil"\nguidance = "text"\ntarget_text = "oil painting"\n'
    )
    config = load_adapt_config(str(file), ["references=other.parquet"])
    assert [d.references for d in config.domain] == ["other.parquet", "own", ""]
    assert config.domain[0].style == "ink"


def test_a_file_with_several_domains(path: str) -> None:
    config = load_adapt_config(path, ["steps=20", "domain.1.weights.content=0.25"])
    assert [d.name for d in config.domain] == ["ink", "oil"]
    assert (config.steps, config.rank, config.layers) == (20, 2, (1, 2))
    assert [(c.source, c.weight) for c in config.clips] == [
        ("refinery", 0.5),
        ("openai/clip-vit-base-patch32", 1.0),
    ]
    assert [(m.name, m.settings) for m in config.invert] == [("e4e", {}), ("wplus", {"steps": 20})]
    assert config.input.fit == "resize"
    ink, oil = config.domain
    assert (ink.weight("direction"), ink.weight("distribution")) == (0.5, 1.0)
    assert (oil.weight("content"), oil.weight("direction")) == (0.25, 1.0)
    assert not ink.weight("tokens")


def test_domains_from_the_command_line(path: str) -> None:
    table = {"name": "clay", "references": "clay"}
    assert [d.name for d in load_adapt_config(path, domains=[table]).domain] == ["clay"]
    assert load_adapt_config(domains=[table]).generator == "faces64"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["stepz=3"], r"stepz: unknown key; did you mean 'steps'"),
        (["domain.0.reference=a"], r"domain.0.reference: unknown key; did you mean 'references'"),
        (["domain.1.target_text="], r"oil: text guidance needs source_text and target_text"),
        (["steps=0"], r"steps must be >= 1, got 0"),
        (["invert.1.stepz=3"], r"invert.1.stepz: unknown key; did you mean 'steps'"),
        (["invert.0.name=e5e"], r"invert.0.name: unknown method 'e5e'.*'e4e'"),
        (["clips.0.wait=3"], r"clips.0.wait: unknown key; did you mean 'weight'"),
        (["input.fits=crop"], r"input.fits: unknown key; did you mean 'fit'"),
        (["domain=3"], r"domain: expected \[\[domain\]\] tables, found 3"),
    ],
)
def test_wrong_settings_are_named(path: str, sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_adapt_config(path, sets)


def test_no_domain() -> None:
    with pytest.raises(ConfigError, match=r"domain: there is none; write a \[\[domain\]\] table"):
        load_adapt_config()


def test_the_rate_warms_up_and_falls() -> None:
    table = {"name": "clay", "references": "clay"}
    config = load_adapt_config(None, ["steps=100", "learning_rate=0.2"], domains=[table])
    assert config.rate(0) == pytest.approx(0.02)
    assert config.rate(30) == pytest.approx(0.2)
    assert config.rate(75) == pytest.approx(0.1)
    assert config.rate(99) < 0.001
    weights = dataclasses.replace(config, form="weights", learning_rate=None)
    assert weights.peak_rate == 0.002


def test_the_clip_is_one_setting(tmp_path: Path) -> None:
    wished = [{"name": "x", "guidance": "text", "target_text": "oil painting"}]
    config = load_adapt_config(None, ["clips.0.source=some/clip"], domains=wished)
    assert [clip.source for clip in config.clips] == ["some/clip"]
    path = tmp_path / "adapt.toml"
    path.write_text('[[clips]]\nsource = "a"\n[[clips]]\nsource = "b"\nweight = 0.5\n')
    config = load_adapt_config(str(path), ["clips.1.weight=0.25"], domains=wished)
    assert [(clip.source, clip.weight) for clip in config.clips] == [("a", 1.0), ("b", 0.25)]


# ---------------------------------------------------------------------- a child generator


def test_a_domain_moves_to_a_fine_tuned_child(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, then the pictures: the child changes as its parent did."""
    parent, child = make_tiny_generator(), make_tiny_generator()
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.mul_(1.01)
    save_generator(child, tmp_path / "child.safetensors", {"terms": "test"})
    widths = {4: 12, 8: 12, 16: 8, 32: 8}
    sizes = {"resolution": 32, "widths": widths, "z_dim": 16, "w_dim": 16, "mapping_layers": 2}
    other = Generator(GeneratorArchitecture(**sizes))
    other.latent_avg.zero_()
    save_generator(other, tmp_path / "other.safetensors", {})
    stream = torch.Generator().manual_seed(0)
    tokens = TokenSets.fresh(parent, (), "shared", 2, [stream], 0.3)
    card = {"status": "finished", "note": "", "steps": 1, "best_step": 1, "score": 0.1}
    made = Domain.of_tokens("ink", weights_hash(parent), tokens, card)
    save_domain(made, tmp_path / "domains" / "ink")
    out = str(tmp_path / "domains")

    def command(generator: str) -> int:
        parts = ["move", "ink", "ink-of-child", "--out", out]
        return app([*parts, "--generator", str(tmp_path / generator)], result_action="return_value")

    assert command("child.safetensors") == 0
    assert "ink-of-child" in capsys.readouterr().out
    child = load_generator(str(tmp_path / "child.safetensors"))
    moved = find_domain("ink-of-child", child, (out,))
    assert moved.card["moved_from"] == weights_hash(parent)
    w_plus = parent.latent_avg.expand(3, parent.num_ws, -1) + torch.randn(3, 1, 16)
    changes = []
    for generator, domain in ((parent, made), (child, moved)):
        plain = without_noise(w_plus, generator)
        after = add_domains(plain, [[(domain, 1.0)]]).render(generator)
        changes.append((after - plain.render(generator)).flatten())
    assert float(torch.corrcoef(torch.stack(changes))[0, 1]) > 0.95
    with pytest.raises(AssetError, match=r"domain ink"):
        find_domain("ink", child, (out,))
    with pytest.raises(AssetError, match=r"fine-tuned from its own, not to another one"):
        command("other.safetensors")

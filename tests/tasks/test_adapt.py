"""Adaptation jobs on a tiny generator: what they write, resume, refuse and survive."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tasks.adapt.job as job_module
import tasks.adapt.loop as loop
from models.adaptation.domain import add_domains, load_domain, without_noise
from models.checkpoints.native import save_generator
from models.errors import AssetError, ConfigError
from models.files import PARTIAL_SUFFIX
from models.losses.trunk import PerceptualTrunk, TrunkArchitecture
from models.stylegan2.generator import Generator
from tasks.adapt.config import AdaptConfig, ClipConfig, DomainConfig
from tasks.adapt.guidance import Guide
from tasks.adapt.job import AdaptProgress, adapt
from tasks.adapt.terms import GIVEN, TERMS
from tasks.job import MethodConfig
from tests.conftest import make_picture, make_tiny_generator


class FakeClip(torch.nn.Module):
    """A random projection of small pictures, and of the letters of a text."""

    name, hash = "fake", "ab" * 32

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.register_buffer("matrix", torch.randn(3 * 64, 12, generator=rng))
        self.register_buffer("letters", torch.randn(128, 12, generator=rng))

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.adaptive_avg_pool2d(images, 8).flatten(1) @ self.matrix, dim=1)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        return F.unfold(images, 8, stride=8).transpose(1, 2)

    def ignored(self, text: str) -> set[str]:
        return {word for word in text.split() if word.startswith("z")}

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [self.letters[[ord(c) % 128 for c in sorted(text)]].mean(0) for text in texts]
        return F.normalize(torch.stack(rows), dim=1)


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP of one matrix, and a thin random trunk in place of the bundled one."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        trunk = PerceptualTrunk(TrunkArchitecture(widths=(8,) * 5, depths=(1,) * 5))
    trunk.eval().requires_grad_(False)
    monkeypatch.setattr(job_module, "load_trunk", lambda _: (trunk, {}))

    def load(source: str) -> FakeClip:
        if source == "missing":
            raise AssetError("CLIP missing: no such folder")
        return FakeClip()

    monkeypatch.setattr(job_module, "load_clip", load)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator's file, and two folders of reference pictures."""
    root = tmp_path_factory.mktemp("adapt")
    save_generator(make_tiny_generator(), root / "tiny.safetensors", {"terms": "test"})
    for style, tint in (("warm", (1.0, 0.4, 0.1)), ("cold", (0.1, 0.3, 1.0))):
        (root / style).mkdir()
        for seed in range(4):
            picture = make_picture(seed, 40)
            bands = [b.point(lambda v, t=t: int(v * t)) for b, t in zip(picture.split(), tint)]  # noqa: B905
            Image.merge("RGB", bands).save(root / style / f"{seed}.png")
    return root


def images(
    place: Path, name: str = "warm", weights: dict[str, float] | None = None, **changes: Any
) -> DomainConfig:
    """By their distribution alone, unless `weights` says more: the trunk is random."""
    plain = {"patches": 0.0, "adversarial": 0.0, "content": 0.05}
    weights = plain | (weights or {})
    return DomainConfig(name=name, references=str(place / name), weights=weights, **changes)


def job(place: Path, out: Path, *domains: DomainConfig, **changes: Any) -> AdaptConfig:
    settings: dict[str, Any] = {
        "generator": str(place / "tiny.safetensors"),
        "steps": 8,
        "batch": 3,
        "rank": 2,
        "validation_every": 3,
        "validation_codes": 4,
        "preview_every": 4,
        "learning_rate": 0.05,
    }
    return AdaptConfig(domain=domains, out=str(out), **(settings | changes))


def tokens(folder: Path) -> dict[str, torch.Tensor]:
    domain = load_domain(folder)
    assert domain.tokens is not None
    return domain.tokens.tensors()


# ---------------------------------------------------------------------- what comes out


def test_a_set_of_pictures_pulls_the_colours(place: Path, tmp_path: Path) -> None:
    seen: list[AdaptProgress] = []
    config = job(place, tmp_path, images(place), images(place, "cold"), steps=24)
    warm, cold = adapt(config, seen.append)
    generator = make_tiny_generator()
    z = torch.randn(8, generator.z_dim, generator=torch.Generator().manual_seed(5))
    plain = without_noise(generator.mapping(z, truncation_psi=0.8), generator)
    red_over_blue = {}
    for name, mix in (("plain", []), ("warm", [(load_domain(warm), 1.0)]), ("cold", [
        (load_domain(cold), 1.0)])):  # fmt: skip
        picture = add_domains(plain, [mix]).render(generator).mean((0, 2, 3))
        red_over_blue[name] = float(picture[0] - picture[2])
    assert red_over_blue["warm"] > red_over_blue["plain"] + 0.2
    assert red_over_blue["cold"] < red_over_blue["plain"] - 0.2
    assert [p.step for p in seen] == list(range(1, 25))
    assert seen[-1].scores["warm"] < 0.85 * seen[0].scores["warm"]
    assert not (tmp_path / ".jobs").exists() or not list((tmp_path / ".jobs").iterdir())
    for folder in (warm, cold):
        names = sorted(p.name for p in folder.iterdir())
        assert names == ["card.json", "job.parquet", "preview.png", "tokens.safetensors"]
        card = json.loads((folder / "card.json").read_text())
        assert (card["status"], card["steps"], card["references"]) == ("finished", 24, 4)
        assert card["score"] == pytest.approx(sum(card["scores"].values()), abs=1e-4)
        assert str(place) not in json.dumps(card)
        with Image.open(folder / "preview.png") as preview:
            assert preview.size == (4 * 32, 2 * 32)
        row = pq.read_table(folder / "job.parquet").to_pylist()[0]
        assert (row["domain"], row["status"], row["rank"]) == (folder.name, "finished", 2)
        assert json.loads(row["settings"])["learning_rate"] == 0.05
        assert row["bytes"] == sum(2 * t.numel() for t in tokens(folder).values())


def test_guidance_by_text_starts_at_a_zero_difference(place: Path, tmp_path: Path) -> None:
    text = DomainConfig(
        name="ink",
        guidance="text",
        source_text="photo",
        target_text="ink drawing",
        weights={"in_domain": 0.0, "content": 0.0},
    )
    seen: list[AdaptProgress] = []
    (folder,) = adapt(job(place, tmp_path, text, steps=20), seen.append)
    assert seen[0].scores["ink"] == pytest.approx(1.0)
    card = json.loads((folder / "card.json").read_text())
    assert card["scores"]["direction"] < 0.7
    assert card["clips"] == ["fake"]


def test_guidance_by_one_picture(place: Path, tmp_path: Path) -> None:
    one = DomainConfig(
        name="one",
        guidance="image",
        references=str(place / "warm" / "0.png"),
        weights={"in_domain": 1.0, "distribution": 0.5},
    )
    chain = (MethodConfig(name="wplus", settings={"steps": 3}),)
    seen: list[AdaptProgress] = []
    config = job(place, tmp_path, one, images(place, "cold"), steps=6, invert=chain)
    (folder, _) = adapt(config, seen.append)
    scores = json.loads((folder / "card.json").read_text())["scores"]
    assert set(scores) == {
        "across",
        "within",
        "reference_clip",
        "reference_mse",
        "reference_perceptual",
        "tokens",
        "patches",
        "distribution",
        "in_domain",
        "content",
    }
    assert sum(scores.values()) < 0.9 * seen[0].scores["one"]


def test_all_weights_behind_the_same_interface(place: Path, tmp_path: Path) -> None:
    seen: list[AdaptProgress] = []
    config = job(place, tmp_path, images(place), form="weights", steps=12, learning_rate=0.01)
    (folder,) = adapt(config, seen.append)
    domain = load_domain(folder)
    assert domain.residual is None
    assert domain.weights is not None
    assert not any(k.startswith("to_rgb") or "modulation" in k for k in domain.weights)
    assert seen[-1].scores["warm"] < 0.9 * seen[0].scores["warm"]
    assert domain.card["form"] == "weights"


def test_style_offsets_behind_the_same_interface(place: Path, tmp_path: Path) -> None:
    seen: list[AdaptProgress] = []
    (folder,) = adapt(job(place, tmp_path, images(place), form="style", steps=12), seen.append)
    domain = load_domain(folder)
    generator = make_tiny_generator()
    assert domain.weights is not None
    assert all(name.endswith(".conv.modulation.bias") for name in domain.weights)
    wide = sum(generator.conv(i).conv.weight.shape[2] for i in range(generator.num_convs))
    assert sum(d.codes.numel() for d in domain.weights.values()) == wide
    assert seen[-1].scores["warm"] < 0.95 * seen[0].scores["warm"]
    # A change of the affines' biases is an offset of all styles: both doors render the same.
    codes = without_noise(generator.latent_avg.expand(2, generator.num_ws, -1).clone(), generator)
    by_bias = add_domains(codes, [[(domain, 0.5)]]).render(generator)
    at = {f"{name}.conv.modulation.bias": i for i, (name, *_) in enumerate(generator.layers())}
    shift = {at[k]: 0.5 * d.value() for k, d in domain.weights.items()}
    shifted = codes.edited(generator, codes.w_plus, style_shift=shift)
    torch.testing.assert_close(by_bias, shifted.render(generator), atol=1e-4, rtol=0)
    assert float((by_bias - codes.render(generator)).abs().mean()) > 1e-3


def test_tokens_of_clip_and_patches_pull(place: Path, tmp_path: Path) -> None:
    both = images(place, weights={"distribution": 0.0, "tokens": 1.0, "patches": 1.0})
    seen: list[AdaptProgress] = []
    (folder,) = adapt(job(place, tmp_path, both, steps=16), seen.append)
    scores = json.loads((folder / "card.json").read_text())["scores"]
    assert set(scores) == {"tokens", "patches", "in_domain", "content"}
    assert seen[-1].scores["warm"] < 0.9 * seen[0].scores["warm"]


def test_half_precision_learns_the_same_domain(place: Path, tmp_path: Path) -> None:
    found = [
        json.loads((adapt(config)[0] / "card.json").read_text())
        for config in (
            job(place, tmp_path / p, images(place), precision=p) for p in ("float32", "bfloat16")
        )
    ]
    assert found[0]["score"] == pytest.approx(found[1]["score"], rel=0.1)
    assert found[0]["score"] != found[1]["score"]


def test_colours_may_stay_the_sources(place: Path, tmp_path: Path) -> None:
    """Red references, recoloured to the source's: nothing turns red."""
    generator = make_tiny_generator()
    z = torch.randn(8, generator.z_dim, generator=torch.Generator().manual_seed(5))
    plain = without_noise(generator.mapping(z, truncation_psi=0.8), generator)

    def tint(folder: Path) -> float:
        mean = add_domains(plain, [[(load_domain(folder), 1.0)]]).render(generator).mean((0, 2, 3))
        return float(mean[0] - mean[2])

    free = {"in_domain": 0.0, "content": 0.0}
    config = job(
        place,
        tmp_path,
        replace(images(place, weights=free), name="red"),
        replace(images(place, weights=free, colour=0.0), name="lines"),
        steps=24,
    )
    red, lines = adapt(config)
    assert tint(red) > tint(lines) + 0.1


@pytest.mark.parametrize("form", ["tokens", "style", "weights"])
def test_a_file_of_half_the_strength(form: str, place: Path, tmp_path: Path) -> None:
    generator = make_tiny_generator()
    codes = without_noise(generator.latent_avg.expand(2, generator.num_ws, -1).clone(), generator)
    whole, half = (
        load_domain(adapt(job(place, tmp_path / str(s), images(place, strength=s), form=form))[0])
        for s in (1.0, 0.5)
    )
    by_mix = add_domains(codes, [[(whole, 0.5)]]).render(generator)
    by_file = add_domains(codes, [[(half, 1.0)]]).render(generator)
    torch.testing.assert_close(by_file, by_mix, atol=0.02, rtol=0)
    assert float((by_file - codes.render(generator)).abs().mean()) > 1e-3


def test_words_that_clip_does_not_know(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FakeClip does not know words with a z."""
    text = DomainConfig(name="ink", guidance="text", target_text="zorn zebra photo of a face")
    with pytest.raises(ConfigError, match=r"ink: target_text .* does not know zebra, zorn, so"):
        adapt(job(place, tmp_path, text))
    assert not list(tmp_path.iterdir())
    shared = replace(text, source_text="photo of a zebra", target_text="ink drawing of a zebra")
    with caplog.at_level(logging.WARNING):
        adapt(job(place, tmp_path, shared, steps=1))
    assert "ink: CLIP fake does not know zebra" in caplog.text


def test_every_term_fits_some_guidance() -> None:
    for name, term in TERMS.items():
        guidances = [g for g in GIVEN if term.fits(g)]
        assert guidances, name
        assert set(term.weights) <= set(guidances), name


def test_an_adversary_may_pull_alone(place: Path, tmp_path: Path) -> None:
    alone = images(place, weights={"distribution": 0.0, "adversarial": 1.0})
    (folder,) = adapt(job(place, tmp_path, alone, steps=4))
    assert json.loads((folder / "card.json").read_text())["scores"].keys() == {
        "in_domain",
        "content",
    }


# ---------------------------------------------------------------------- independence, resume


def test_a_domain_is_the_same_alone_and_in_company(place: Path, tmp_path: Path) -> None:
    text = DomainConfig(name="ink", guidance="text", target_text="ink drawing")
    company = (images(place), text, images(place, "cold", weights={"adversarial": 0.2}))
    together = adapt(job(place, tmp_path / "together", *company))
    for domain, folder in zip(company, together, strict=True):
        (alone,) = adapt(job(place, tmp_path / "alone", domain))
        expected = tokens(folder)
        moved = 0.0
        for name, value in tokens(alone).items():
            assert float((value - expected[name]).abs().max()) < 2e-3, (domain.name, name)
            if name.endswith("_q"):
                moved = max(moved, float(value.abs().max()))
        assert moved > 0.02


def test_terms_of_all_domains_at_once_are_those_of_each(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin computes them domain by domain; a CLIP has no say in a domain without one."""
    texts = [
        DomainConfig(name=f"d{i}", guidance="text", target_text=text, weights={"content": 0.1 + i})
        for i, text in enumerate(("ink drawing", "pencil sketch"))
    ]
    joint = {"direction", "in_domain", "content"}
    for number, company in enumerate([texts, [texts[0], images(place)], [images(place)]]):
        work = job_module._Job(job(place, tmp_path / str(number), *company))
        work.prepare()
        descent, codes = work.descent, work.descent.held_out
        rng = torch.Generator().manual_seed(0)
        moved = [t + 0.3 * torch.randn(t.shape, generator=rng) for t in descent.adam.tensors]
        maps = descent._views(len(codes))
        before = descent._look(descent._source(codes), maps)
        found = descent._terms(moved, codes, before, maps, is_training=False)
        real, known = loop.joint_terms, list[set[str]]()

        def none(guides: Any, *seen: Any, real: Any = real, known: Any = known) -> Any:
            known.extend(set(terms) for terms in real(guides, *seen))
            return [{} for _ in guides]

        with monkeypatch.context() as patch:
            patch.setattr(loop, "joint_terms", none)
            twin = descent._terms(moved, codes, before, maps, is_training=False)
        assert known == [joint if company is texts else joint - {"direction"}] * len(company)
        assert [list(terms) for terms in found] == [list(terms) for terms in twin]
        for terms, want in zip(found, twin, strict=True):
            for name, value in want.items():
                assert value.shape == (len(codes),)
                torch.testing.assert_close(terms[name], value, atol=2e-6, rtol=2e-5)


class KilledError(Exception):
    pass


def test_killed_and_resumed_is_uninterrupted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    company = (
        images(place, weights={"adversarial": 0.2}),
        DomainConfig(name="ink", guidance="text", target_text="ink drawing"),
    )
    whole = adapt(job(place, tmp_path / "whole", *company, steps=12))
    config = job(place, tmp_path / "cut", *company, steps=12)
    for last in (6, 10):  # after the checkpoints of steps 4 and 8

        def kill(progress: AdaptProgress, last: int = last) -> None:
            if progress.step == last:
                raise KilledError

        with pytest.raises(KilledError):
            adapt(config, kill)
        assert not (tmp_path / "cut" / "warm").exists()
    seen: list[AdaptProgress] = []
    resumed = adapt(config, seen.append)
    assert [p.step for p in seen] == [9, 10, 11, 12]
    for a, b in zip(whole, resumed, strict=True):
        assert (a / "tokens.safetensors").read_bytes() == (b / "tokens.safetensors").read_bytes()
    # Finished is finished; another setting is another job.
    assert adapt(config, seen.append) == resumed
    assert len(seen) == 4
    adapt(replace(config, steps=1), seen.append)
    assert len(seen) == 5


def test_what_a_killed_job_left_half_written_goes(place: Path, tmp_path: Path) -> None:
    left = tmp_path / "warm" / f".job.parquet.0123456789abcdef{PARTIAL_SUFFIX}"
    left.parent.mkdir()
    left.write_bytes(b"PAR1")
    (folder,) = adapt(job(place, tmp_path, images(place)))
    names = {"card.json", "job.parquet", "preview.png", "tokens.safetensors"}
    assert {path.name for path in folder.iterdir()} == names


def test_a_damaged_checkpoint(place: Path, tmp_path: Path) -> None:
    config = job(place, tmp_path, images(place))

    def kill(progress: AdaptProgress) -> None:
        if progress.step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        adapt(config, kill)
    (path,) = tmp_path.glob(".jobs/*/checkpoint.pt")
    assert path.with_name("warm.png").is_file()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(AssetError, match=r"checkpoint.pt: cannot read .*delete it and start"):
        adapt(config)


@pytest.mark.parametrize("fault", ["loss", "gradient", "score"])
def test_a_domain_that_diverges_leaves_the_others_alone(
    fault: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Guide.losses
    calls = {"n": 0}

    def broken(
        self: Guide, after: Any, *args: Any, is_training: bool, known: dict[str, Any]
    ) -> dict:
        found = sound(self, after, *args, is_training=is_training, known=known)
        if self.domain.name != "cold":
            return found
        calls["n"] += 1
        if calls["n"] >= 6 and is_training == (fault != "score"):
            if fault == "gradient":  # finite itself
                zero = (after.images * 0).sum((1, 2, 3)).clamp(min=0).sqrt()
                found["distribution"] = found["distribution"] + zero
            else:
                found["distribution"] = found["distribution"] * float("nan")
        return found

    company = (images(place, "cold"), images(place))
    monkeypatch.setattr(Guide, "losses", broken)
    seen: list[AdaptProgress] = []
    cold, warm = adapt(job(place, tmp_path / "both", *company), seen.append)
    monkeypatch.setattr(Guide, "losses", sound)
    card = json.loads((cold / "card.json").read_text())
    assert card["status"] == "diverged"
    assert "not finite" in card["note"]
    assert seen[-1].notes["cold"] == card["note"]
    assert card["steps"] < 8
    assert all(bool(t.isfinite().all()) for t in tokens(cold).values())
    assert max(float(t.abs().max()) for n, t in tokens(cold).items() if n.endswith("_q")) > 0
    (alone,) = adapt(job(place, tmp_path / "alone", images(place)))
    for name, value in tokens(alone).items():
        assert float((value - tokens(warm)[name]).abs().max()) < 2e-3, name


def test_patience_stops_and_keeps_the_best(place: Path, tmp_path: Path) -> None:
    config = job(place, tmp_path, images(place), steps=60, learning_rate=5.0, warm_up=0, patience=2)
    (folder,) = adapt(config)
    card = json.loads((folder / "card.json").read_text())
    assert card["status"] == "stopped"
    assert card["steps"] < 60
    assert card["best_step"] == card["steps"] - 2 * 3


# ---------------------------------------------------------------------- bad input


def test_references_that_cannot_be_used(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    for folder, message in (
        (empty, r"warm: references .*empty"),
        (broken, r"warm: references .*found 1 that cannot be used: a.png"),
        (tmp_path / "missing", r"warm: references .*missing"),
    ):
        domain = DomainConfig(name="warm", references=str(folder))
        with pytest.raises(ConfigError, match=message):
            adapt(job(place, out, domain))
    make_picture(1).save(broken / "b.png")
    make_picture(2).save(broken / "c.png")
    with caplog.at_level(logging.WARNING):
        (folder,) = adapt(job(place, out, DomainConfig(name="warm", references=str(broken))))
    assert "warm: 1 of 3 references left out: a.png" in caplog.text
    assert json.loads((folder / "card.json").read_text())["references"] == 2


def test_limits_of_references(place: Path, tmp_path: Path) -> None:
    (folder,) = adapt(job(place, tmp_path, images(place, reference_limit=3), steps=1))
    assert json.loads((folder / "card.json").read_text())["references"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": "text"}, "x: text guidance needs source_text and target_text"),
        ({}, "x: images guidance needs `references`"),
        ({"guidance": "image"}, "x: image guidance needs `references`"),
        ({"guidance": "sound"}, "guidance: expected one of text, image, images, found 'sound'"),
        ({"references": "a", "weights": {"across": 1.0}}, "weights.across: images guidance has"),
        ({"references": "a", "weights": {"content": -1.0}}, "weights.content must be >= 0"),
        (
            {
                "references": "a",
                "weights": {"distribution": 0.0, "patches": 0.0, "adversarial": 0.0},
            },
            "no term pulls",
        ),
        ({"references": "a", "colour": 1.5}, r"colour must be in 0\.\.1"),
        ({"references": "a", "reference_limit": 0}, "reference_limit must be >= 1"),
        ({"references": "a", "name": "a/b"}, "expected the name of a folder, found 'a/b'"),
        (
            {"guidance": "text", "target_text": "b", "templates": ("a face",)},
            "templates: expected texts with {}",
        ),
    ],
)
def test_settings_of_a_domain_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DomainConfig(**({"name": "x"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"batch": 1}, "batch must be >= 2"),
        ({"rank": 0}, "rank must be >= 1"),
        ({"truncation_psi": 1.5}, "truncation_psi must be in 0..1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"form": "both"}, "form: expected one of tokens, style, weights"),
        ({"layers": (99,)}, r"layers: expected indices of 3x3 layers in 0..6, found 99"),
        ({"invert": (MethodConfig(name="magic"),)}, "magic"),
        ({"generator": "nowhere"}, "no bundled generator of that name"),
    ],
)
def test_settings_of_a_job_that_make_no_sense(
    place: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises((ConfigError, AssetError), match=message):
        adapt(job(place, tmp_path, images(place), **changes))
    assert not list(tmp_path.iterdir())


def test_clips_and_texts_that_do_not_serve(place: Path, tmp_path: Path) -> None:
    text = DomainConfig(name="ink", guidance="text", source_text="ab", target_text="ba")
    with pytest.raises(ConfigError, match=r"'ab' and 'ba' have the same embedding"):
        adapt(job(place, tmp_path, text))
    with pytest.raises(AssetError, match="CLIP missing: no such folder"):
        adapt(job(place, tmp_path, text, clips=(ClipConfig(source="missing"),)))
    with pytest.raises(ConfigError, match="ink: text guidance needs a CLIP and `clips` is empty"):
        job(place, tmp_path, text, clips=())
    # A set of pictures needs none.
    (folder,) = adapt(job(place, tmp_path, images(place), clips=(), steps=1))
    assert json.loads((folder / "card.json").read_text())["clips"] == []
    with pytest.raises(ConfigError, match=r"weights\.identity needs `identity`"):
        job(place, tmp_path, images(place, weights={"identity": 1.0}))
    with pytest.raises(ConfigError, match=r"different names, found \['warm', 'warm'\]"):
        job(place, tmp_path, images(place), images(place))


def test_a_conditional_generator_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator: Generator = make_tiny_generator()
    generator.c_dim = 3
    monkeypatch.setattr(job_module, "load_generator", lambda _: generator)
    with pytest.raises(ConfigError, match="it is conditional"):
        adapt(job(place, tmp_path, images(place)))

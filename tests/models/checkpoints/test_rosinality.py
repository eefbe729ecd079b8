"""Every form of rosinality's files, from a tiny generator; the golden files are in tests/parity."""

import pytest
import torch

from models.checkpoints.load import load_discriminator, load_generator
from models.checkpoints.rosinality import save_rosinality
from models.errors import AssetError
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator, GeneratorArchitecture, weights_hash
from models.stylegan2.resample import filter_2d


@pytest.fixture
def state(tiny_generator):
    """What rosinality's generator would save: filters in, latent_avg not."""
    state = {k: v.clone() for k, v in tiny_generator.state_dict().items() if k != "latent_avg"}
    for block in range(3):
        state[f"convs.{2 * block}.conv.blur.kernel"] = filter_2d(4.0)
        state[f"to_rgbs.{block}.upsample.kernel"] = filter_2d(4.0)
    return state


@pytest.fixture
def save(tmp_path):
    def write(saved):
        path = tmp_path / "checkpoint.pt"
        torch.save(saved, path)
        return path

    return write


def _prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


FORMS = {
    "g_ema": lambda s, avg: {"g_ema": s, "latent_avg": avg},
    "bare": lambda s, avg: {**s, "latent_avg": avg},
    "parallel": lambda s, avg: {"g_ema": _prefixed(s, "module."), "latent_avg": avg},
    "e4e": lambda s, avg: {
        "state_dict": {"encoder.body.weight": torch.zeros(2), **_prefixed(s, "decoder.")},
        "latent_avg": avg.repeat(8, 1),
        "opts": {"stylegan_size": 32},
    },
    "row": lambda s, avg: {"g_ema": s, "latent_avg": avg[None]},
    "ganinverter": lambda s, avg: {
        "encoder": {"encoder.body.weight": torch.zeros(2), "latent_avg": avg.repeat(8, 1)},
        "decoder": s,
    },
    "half": lambda s, avg: {"g_ema": {k: v.double() for k, v in s.items()}, "latent_avg": avg},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, state, save, tiny_generator):
    path = save(FORMS[form](state, tiny_generator.latent_avg))
    loaded = load_generator(path)
    assert loaded.architecture == tiny_generator.architecture
    assert weights_hash(loaded) == weights_hash(tiny_generator)
    assert loaded.provenance["latent_avg"] == "stored"
    assert loaded.provenance["source"] == "checkpoint.pt"
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    w_plus = torch.randn(2, 8, 16)
    assert torch.equal(loaded.synthesis(w_plus), tiny_generator.synthesis(w_plus))


def test_widths_depth_and_dimensions_come_from_the_shapes(tmp_path):
    arch = GeneratorArchitecture(
        resolution=16, widths={4: 5, 8: 7, 16: 3}, z_dim=9, w_dim=6, mapping_layers=3
    )
    generator = Generator(arch)
    generator.latent_avg.zero_()
    save_rosinality(generator, None, tmp_path / "g.pt")
    saved = torch.load(tmp_path / "g.pt", weights_only=True)
    saved.pop("architecture")
    torch.save(saved, tmp_path / "g.pt")
    assert load_generator(tmp_path / "g.pt").architecture == arch


def test_missing_latent_avg_is_estimated_and_said(state, save, caplog, tiny_generator):
    path = save({"g_ema": state})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loaded = load_generator(path)
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from torch's stream
    assert loaded.provenance["latent_avg"] == "estimated from 10000 samples, seed 0"
    assert "checkpoint.pt: no latent_avg in the file" in caplog.text
    assert torch.equal(loaded.latent_avg, load_generator(path).latent_avg)
    # The fixture's own average is another estimate of the same mean.
    assert (loaded.latent_avg - tiny_generator.latent_avg).abs().max() < 0.2
    assert loaded.latent_avg.abs().max() > 0


def test_differing_rows_of_latent_avg_are_averaged(state, save, caplog):
    rows = torch.arange(8.0)[:, None].expand(8, 16)
    loaded = load_generator(save({"g_ema": state, "latent_avg": rows}))
    assert torch.equal(loaded.latent_avg, torch.full((16,), 3.5))
    assert "the rows of latent_avg differ" in caplog.text


def test_training_network_and_missing_noise_are_said(state, save, caplog, tiny_generator):
    for index in range(7):
        del state[f"noises.noise_{index}"]
    loaded = load_generator(save({"g": state, "latent_avg": tiny_generator.latent_avg}))
    assert "noise maps: absent in the file, drawn with seed 0" in loaded.provenance["notes"]
    assert any("no moving average" in note for note in loaded.provenance["notes"])
    assert "no g_ema" in caplog.text
    assert loaded.noises.noise_6.shape == (1, 1, 32, 32)
    assert abs(float(loaded.noises.noise_6.std()) - 1) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("convs.1.noise.weight"), "missing convs.1.noise.weight, unknown nothing"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "unknown extra.weight"),
        (
            lambda s: s.update({"convs.3.conv.modulation.bias": torch.zeros(3)}),
            r"convs.3.conv.modulation.bias has shape \[3\], expected \[8\]",
        ),
        (
            lambda s: s.update({"convs.0.conv.blur.kernel": filter_2d(1.0)}),
            r"convs.0.conv.blur.kernel is another resampling filter than \[1, 3, 3, 1\]",
        ),
        (
            lambda s: s["conv1.conv.weight"].fill_(float("nan")),
            "conv1.conv.weight has values that are not finite",
        ),
        (lambda s: s.pop("input.input"), "not the weights of a StyleGAN2 generator"),
    ],
)
def test_wrong_weights(state, save, change, message):
    change(state)
    with pytest.raises(AssetError, match=message):
        load_generator(save({"g_ema": state}))


def test_wrong_latent_avg(state, save):
    with pytest.raises(AssetError, match=r"latent_avg has shape \[5\], expected \[16\]"):
        load_generator(save({"g_ema": state, "latent_avg": torch.zeros(5)}))


def test_other_torch_files(save):
    with pytest.raises(AssetError, match=r"no StyleGAN2 generator .* found the keys epoch, model"):
        load_generator(save({"epoch": 3, "model": {"fc.weight": torch.zeros(2)}}))
    with pytest.raises(AssetError, match="found an object of type Tensor"):
        load_generator(save(torch.zeros(3)))
    with pytest.raises(AssetError, match="no discriminator in this checkpoint"):
        load_discriminator(save({"g_ema": {}}))


def test_broken_file(save, state):
    path = save({"g_ema": state})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(AssetError, match=r"not a readable torch checkpoint .* download it again"):
        load_generator(path)


def test_round_trip_keeps_what_the_layout_cannot_say(tmp_path, caplog):
    arch = GeneratorArchitecture(
        resolution=8,
        widths={4: 4, 8: 4},
        z_dim=4,
        w_dim=4,
        mapping_layers=2,
        c_dim=3,
        mapping_lr_mul=0.1,
        conv_clamp=256.0,
    )
    generator = Generator(arch)
    generator.latent_avg.zero_()
    d = Discriminator(8, {4: 4, 8: 4}, c_dim=3, mapping_layers=2, stddev_group=2, conv_clamp=9.0)
    save_rosinality(generator, d, tmp_path / "g.pt")
    assert "have no place in rosinality's layout" in caplog.text
    loaded = load_generator(tmp_path / "g.pt")
    assert loaded.architecture == arch
    assert weights_hash(loaded) == weights_hash(generator)
    e = load_discriminator(tmp_path / "g.pt")
    assert (e.c_dim, e.stddev_group, e.conv_clamp) == (3, 2, 9.0)
    image, c = torch.randn(2, 3, 8, 8), torch.eye(3)[:2]
    assert torch.equal(e(image, c), d(image, c))


def test_discriminator_shapes(tmp_path):
    d = Discriminator(16, {4: 5, 8: 6, 16: 7})
    state = d.state_dict()
    for block in (1, 2):
        state[f"convs.{block}.conv2.0.kernel"] = filter_2d(1.0)
        state[f"convs.{block}.skip.0.kernel"] = filter_2d(1.0)
    torch.save({"d": state}, tmp_path / "d.pt")
    loaded = load_discriminator(tmp_path / "d.pt")
    image = torch.randn(4, 3, 16, 16)
    assert torch.equal(loaded(image), d(image))
    state["convs.1.skip.0.kernel"] = filter_2d(4.0)
    torch.save({"d": state}, tmp_path / "d.pt")
    with pytest.raises(AssetError, match=r"convs.1.skip.0.kernel is another resampling filter"):
        load_discriminator(tmp_path / "d.pt")

"""NVIDIA's pickles beyond the golden one: conditional, clamped, and what is refused."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.checkpoints.load import load_discriminator, load_generator
from models.errors import AssetError


def _normalise(x):
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def _mapping_by_hand(mapping, z, c, lr):
    """stylegan2-ada-pytorch's MappingNetwork, from its tensors."""
    x = _normalise(z) if z is not None else None
    if c is not None:
        embed = mapping["embed"].parameters
        y = _normalise(c @ (embed["weight"] / math.sqrt(c.shape[1])).T + embed["bias"])
        x = y if x is None else torch.cat([x, y], dim=1)
    for index in range(sum(name.startswith("fc") for name in mapping.modules)):
        layer = mapping[f"fc{index}"].parameters
        x = x @ (layer["weight"] * (lr / math.sqrt(x.shape[1]))).T + layer["bias"] * lr
        x = F.leaky_relu(x, 0.2) * math.sqrt(2)
    return x


@pytest.mark.parametrize("is_flat", [False, True], ids=["ada", "stylegan3"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_settings_come_from_the_file(dump_nvidia, nvidia_generator, is_flat, protocol):
    made = nvidia_generator(is_flat=is_flat, clamp=256, layers=3, z=5, w=7, lr=0.02)
    g = load_generator(dump_nvidia({"G": None, "D": None, "G_ema": made}, protocol))
    arch = g.architecture
    assert arch.resolution == 16
    assert arch.widths == {4: 8, 8: 6, 16: 4}
    assert (arch.z_dim, arch.w_dim, arch.c_dim, arch.mapping_layers) == (5, 7, 0, 3)
    assert arch.conv_clamp == 256.0
    assert arch.mapping_lr_mul == 0.02
    assert torch.equal(g.latent_avg, made["mapping"].buffers["w_avg"])
    assert torch.equal(g.convs[3].conv.weight[0], made["synthesis.b16.conv1"].parameters["weight"])
    assert g.convs[3].conv.weight.is_contiguous()
    assert torch.equal(g.noises.noise_3[0, 0], made["synthesis.b16.conv0"].buffers["noise_const"])
    bias = made["synthesis.b8.torgb"].parameters["bias"]
    assert torch.equal(g.to_rgbs[0].bias.flatten(), bias)
    assert g.provenance["format"] == "nvidia"
    assert not g.training
    assert not any(p.requires_grad for p in g.parameters())
    z = torch.randn(4, 5)
    expected = _mapping_by_hand(made["mapping"], z, None, 0.02)
    assert torch.allclose(g.mapping(z)[:, 0], expected, atol=1e-5)


def test_conditional_generator(dump_nvidia, nvidia_generator):
    made = nvidia_generator(c=3, is_flat=True)
    g = load_generator(dump_nvidia({"G_ema": made}))
    assert (g.c_dim, g.z_dim, g.w_dim) == (3, 6, 8)
    z, c = torch.randn(3, 6), torch.eye(3)
    expected = _mapping_by_hand(made["mapping"], z, c, 0.01)
    assert torch.allclose(g.mapping(z, c)[:, 0], expected, atol=1e-5)
    same_z = z[:1].expand(3, -1)
    assert (g.mapping(same_z, c)[0] - g.mapping(same_z, c)[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"conditional: mapping needs c of shape \[N 3\]"):
        g.mapping(z)


def _conv_by_hand(layer, x, clamp, gain=1.0, down=1):
    weight = layer.parameters["weight"]
    k = weight.shape[2]
    weight = weight / math.sqrt(weight.shape[1] * k * k)
    if down == 2:
        taps = layer.buffers["resample_filter"][None, None].expand(x.shape[1], 1, 4, 4)
        x = F.conv2d(F.pad(x, [k // 2 + 1] * 4), taps, groups=x.shape[1])
        x = F.conv2d(x, weight, stride=2)
    else:
        x = F.conv2d(x, weight, padding=k // 2)
    if "bias" not in layer.parameters:
        return x * gain
    x = F.leaky_relu(x + layer.parameters["bias"][None, :, None, None], 0.2)
    x = x * (math.sqrt(2) * gain)
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


def _discriminator_by_hand(made, image, c, clamp, group):
    x = _conv_by_hand(made["b16.fromrgb"], image, clamp)
    for res in (16, 8):
        block = made[f"b{res}"]
        skip = _conv_by_hand(block["skip"], x, None, math.sqrt(0.5), down=2)
        x = _conv_by_hand(block["conv0"], x, clamp)
        x = skip + _conv_by_hand(block["conv1"], x, clamp, math.sqrt(0.5), down=2)
    n = x.shape[0]
    y = x.reshape(group, n // group, *x.shape[1:])
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    y = y.repeat(group)[:, None, None, None].expand(-1, 1, 4, 4)
    x = _conv_by_hand(made["b4.conv"], torch.cat([x, y], 1), clamp).flatten(1)
    fc, out = made["b4.fc"].parameters, made["b4.out"].parameters
    x = F.leaky_relu(x @ fc["weight"].T / math.sqrt(x.shape[1]) + fc["bias"], 0.2) * math.sqrt(2)
    x = x @ out["weight"].T / math.sqrt(x.shape[1]) + out["bias"]
    if c is None:
        return x
    cmap = _mapping_by_hand(made["mapping"], None, c, 0.01)
    return (x * cmap).sum(1, keepdim=True) / math.sqrt(x.shape[1])


@pytest.mark.parametrize(
    ("c_dim", "clamp", "group"), [(0, None, 4), (3, None, 4), (3, 1.5, 2), (0, 1.5, None)]
)
def test_discriminator(dump_nvidia, nvidia_discriminator, c_dim, clamp, group):
    made = nvidia_discriminator(c=c_dim, clamp=clamp, group=group)
    d = load_discriminator(dump_nvidia({"D": made}))
    image = torch.randn(4, 3, 16, 16)
    c = torch.eye(3)[torch.tensor([0, 1, 2, 0])] if c_dim else None
    expected = _discriminator_by_hand(made, image, c, clamp, group or 4)
    assert torch.allclose(d(image, c), expected, rtol=1e-4, atol=1e-5)
    assert d.conv_clamp == clamp
    if c_dim:
        with pytest.raises(ValueError, match="conditional"):
            d(image)


def test_clamp_is_no_decoration(dump_nvidia, nvidia_discriminator):
    image = torch.randn(4, 3, 16, 16)
    made = nvidia_discriminator(clamp=0.5)
    clamped = load_discriminator(dump_nvidia({"D": made}))
    expected = _discriminator_by_hand(made, image, None, None, 4)
    assert (clamped(image) - expected).abs().max() > 1e-2


def test_layer_without_noise_is_silent(dump_nvidia, nvidia_generator):
    made = nvidia_generator()
    layer = made["synthesis.b8.conv1"]
    layer.settings["use_noise"] = False
    layer.parameters.pop("noise_strength")
    layer.buffers.pop("noise_const")
    g = load_generator(dump_nvidia({"G_ema": made}))
    assert float(g.conv(2).noise.weight) == 0.0
    assert g.noises.noise_2.shape == (1, 1, 8, 8)


def test_generator_alone_and_missing_w_avg(dump_nvidia, nvidia_generator, caplog):
    made = nvidia_generator()
    made["mapping"].buffers.clear()
    g = load_generator(dump_nvidia(made))
    assert g.provenance["latent_avg"] == "estimated from 10000 samples, seed 0"
    assert "no latent_avg" in caplog.text
    assert torch.isfinite(g.latent_avg).all()


def test_frozen_layers_are_buffers(dump_nvidia, nvidia_generator):
    made = nvidia_generator()
    layer = made["mapping.fc0"]
    layer.buffers, layer.parameters = layer.parameters, {}
    g = load_generator(dump_nvidia({"G_ema": made}))
    assert torch.equal(g.style[1].weight, layer.buffers["weight"])


def test_alias_free_networks_are_refused(dump_nvidia, persistent):
    synthesis = persistent(
        "SynthesisNetwork",
        {"input": persistent("SynthesisInput", {}), "L0_36_64": persistent("SynthesisLayer", {})},
        layer_names=["L0_36_64"],
    )
    made = persistent("Generator", {"synthesis": synthesis, "mapping": persistent("Mapping", {})})
    with pytest.raises(AssetError, match=r"alias-free \(stylegan3\).*--cfg=stylegan2"):
        load_generator(dump_nvidia({"G_ema": made}))


def test_other_networks_are_refused(dump_nvidia, persistent):
    made = persistent("TriPlaneGenerator", {"backbone": persistent("Backbone", {})})
    with pytest.raises(AssetError, match="TriPlaneGenerator is not a stylegan2 generator"):
        load_generator(dump_nvidia({"G_ema": made}))
    with pytest.raises(AssetError, match=r"no network G_ema or G .* found the keys D"):
        load_generator(dump_nvidia({"D": made}))
    with pytest.raises(AssetError, match=r"no network D "):
        load_discriminator(dump_nvidia({"G_ema": made}))


@pytest.mark.parametrize(
    ("path", "setting", "value", "message"),
    [
        ("synthesis.b8", "architecture", "resnet", "architecture 'resnet', expected skip"),
        ("synthesis.b8.conv0", "activation", "relu", "activation 'relu', expected lrelu"),
        ("synthesis.b8.conv0", "conv_clamp", 64, "layers differ in conv_clamp"),
        ("mapping.fc1", "bias_gain", 1.0, "layers differ"),
    ],
)
def test_variants_that_would_render_wrongly(
    dump_nvidia, nvidia_generator, path, setting, value, message
):
    made = nvidia_generator()
    made[path].settings[setting] = value
    with pytest.raises(AssetError, match=message):
        load_generator(dump_nvidia({"G_ema": made}))


def test_another_filter_is_refused(dump_nvidia, nvidia_generator):
    made = nvidia_generator()
    made["synthesis.b8.conv0"].buffers["resample_filter"] = torch.full((4, 4), 1 / 16)
    with pytest.raises(AssetError, match=r"synthesis.b8.conv0.resample_filter is another .*filter"):
        load_generator(dump_nvidia({"G_ema": made}))


def test_unknown_tensors_are_refused(dump_nvidia, nvidia_generator):
    made = nvidia_generator()
    made["mapping"].parameters["extra"] = torch.zeros(2)
    with pytest.raises(AssetError, match=r"unknown tensor mapping.extra \[2\]"):
        load_generator(dump_nvidia({"G_ema": made}))


def test_cifar_discriminator_is_refused_by_name(dump_nvidia, nvidia_discriminator):
    made = nvidia_discriminator()
    made["b8"].settings["architecture"] = "orig"
    with pytest.raises(AssetError, match="architecture 'orig', expected resnet"):
        load_discriminator(dump_nvidia({"D": made}))
    made = nvidia_discriminator()
    made["b4"].modules["mbstd"] = None
    with pytest.raises(AssetError, match="minibatch standard deviation"):
        load_discriminator(dump_nvidia({"D": made}))


def test_numpy_scalars_are_plain_numbers(dump_nvidia, nvidia_generator, tmp_path):
    made = nvidia_generator()
    for index in range(2):
        made[f"mapping.fc{index}"].settings["bias_gain"] = np.float32(0.5)
    assert load_generator(dump_nvidia({"G_ema": made})).architecture.mapping_lr_mul == 0.5
    # Protocol 3 names globals as text, so the module's older name can be put in place.
    data = pickle.dumps({"G_ema": made}, protocol=3)
    assert b"cnumpy._core.multiarray\nscalar\n" in data
    old = tmp_path / "old.pkl"
    old.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert load_generator(old).architecture.mapping_lr_mul == 0.5

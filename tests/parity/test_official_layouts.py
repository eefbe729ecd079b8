"""Key names and shapes of the field's official checkpoints: every one is recognised and read."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from models.checkpoints import rosinality
from models.checkpoints.state_dict import read_generator_architecture
from models.stylegan2.resample import filter_2d


@pytest.fixture(scope="module")
def layouts(shared):
    with gzip.open(shared / "golden" / "encoders" / "manifest.json.gz") as file:
        return json.load(file)["layouts"]


def _tensors(shapes, gain):
    """Tensors of these shapes that take no memory; filters are real."""
    return {
        name: filter_2d(gain) if name.endswith(".kernel") else torch.zeros(()).expand(shape)
        for name, shape in shapes.items()
    }


def _saved(layout):
    saved = {k: _tensors(layout[k], 4.0) for k in ("state_dict", "g_ema") if k in layout}
    if "d" in layout:
        saved["d"] = _tensors(layout["d"], 1.0)
    if layout.get("latent_avg"):
        saved["latent_avg"] = torch.zeros(layout["latent_avg"])
    return saved


NAMES = [f"{kind}_{res}" for kind in ("e4e", "psp") for res in (256, 512, 1024)]
NAMES += [f"rosinality_{res}_cm{m}" for res in (256, 512, 1024) for m in (1, 2)]
NAMES += ["clcae_1024"]


@pytest.mark.parametrize("name", NAMES)
def test_architecture_of_official_files(layouts, name):
    saved = _saved(layouts[name])
    _, state = rosinality._find_generator(saved, Path(name))
    state = rosinality._without_filters(state, 4.0, name)
    arch = read_generator_architecture(state, name)
    resolution = int(name.split("_")[1])
    assert arch.resolution == resolution
    assert (arch.z_dim, arch.w_dim, arch.mapping_layers, arch.c_dim) == (512, 512, 8, 0)
    assert arch.num_ws == 2 * int(math.log2(resolution)) - 2
    multiplier = 1 if name.endswith("cm1") else 2
    for res, width in arch.widths.items():
        assert width == (512 if res <= 32 else 16384 // res * multiplier), res


@pytest.mark.parametrize("name", ["e4e_256", "psp_256", "rosinality_256_cm1", "rosinality_256_cm2"])
def test_official_files_load_strictly(layouts, name, monkeypatch):
    layout = layouts[name]
    monkeypatch.setattr(rosinality, "read_torch_file", lambda path: _saved(layout))
    generator = rosinality.load_rosinality_generator(Path(name))
    assert generator.num_ws == 14
    assert generator.latent_avg.shape == (512,)
    if "d" in layout:
        d = rosinality.load_rosinality_discriminator(Path(name))
        assert d.resolution == 256
        assert d.state_dict().keys() == {k for k in layout["d"] if not k.endswith(".kernel")}

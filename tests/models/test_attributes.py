"""The attribute scorer: what its numbers are, sizes, gradients, refusals, and the shipped one."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attributes import (
    NAMES,
    AttributeArchitecture,
    AttributeNetwork,
    AttributeScorer,
    load_attributes,
)
from models.checkpoints.bundled import ASSETS
from models.encoders.checkpoint import save_encoder
from models.errors import AssetError
from models.losses.trunk import load_trunk

SMALL = AttributeArchitecture(
    input_size=32, widths=(4, 6, 8), depths=(1, 1, 1), hidden=8, ages=(20, 40, 60)
)


@pytest.fixture
def network() -> AttributeNetwork:
    torch.manual_seed(0)
    return AttributeNetwork(SMALL).eval()


@pytest.fixture
def images() -> Tensor:
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, 3, 4, 4, generator=rng) * 1.8 - 0.9
    return F.interpolate(coarse, size=(32, 32), mode="bilinear")


def test_numbers_equal_their_definitions(network: AttributeNetwork, images: Tensor) -> None:
    """Slow twin: the layers one by one, the mean age by a loop."""
    scorer = AttributeScorer(network)
    found = scorer(images)
    assert tuple(found) == scorer.names == NAMES
    for row in range(3):
        _, fine, coarse = network.trunk(images[row : row + 1])
        fine = fine.reshape(1, 6, 8, 2, 8, 2).mean((3, 5))
        features = torch.cat([fine.flatten(), coarse.flatten()])
        answers = network.answers(F.silu(network.hidden(features)))
        chances = answers[:3].exp() / answers[:3].exp().sum()
        age = sum(float(p) * years for p, years in zip(chances, (20, 40, 60), strict=True))
        assert float(found["age"][row]) == pytest.approx(age, abs=1e-3)
        for place, name in ((3, "gender"), (4, "smile")):
            chance = 1 / (1 + float(torch.exp(-answers[place])))
            assert float(found[name][row]) == pytest.approx(chance, abs=1e-5)
    logits = scorer.logits(images)
    assert torch.equal(logits["age"], found["age"])
    torch.testing.assert_close(logits["smile"].sigmoid(), found["smile"])


def test_other_sizes_are_resized_and_rows_are_independent(
    network: AttributeNetwork, images: Tensor
) -> None:
    scorer = AttributeScorer(network)
    large = F.interpolate(images, scale_factor=4, mode="bilinear")
    small = F.interpolate(large, (32, 32), mode="bicubic", antialias=True)
    for name, values in scorer(large).items():
        torch.testing.assert_close(values, scorer(small.clamp(-1, 1))[name])
        alone = torch.cat([scorer(image[None])[name] for image in large])
        torch.testing.assert_close(values, alone, atol=1e-4, rtol=1e-5)


def test_gradients_equal_differences(network: AttributeNetwork, images: Tensor) -> None:
    scorer = AttributeScorer(network)
    way = torch.randn_like(images) * 0.1
    images.requires_grad_(True)
    scorer(images)["age"].sum().backward()
    assert images.grad is not None
    with torch.no_grad():
        ends = [scorer(images + step * way)["age"].sum() for step in (1e-2, -1e-2)]
    want = float(ends[0] - ends[1]) / 2e-2
    assert float((images.grad * way).sum()) == pytest.approx(want, rel=0.02, abs=1e-4)


def test_a_file_comes_back(network: AttributeNetwork, images: Tensor, tmp_path: Path) -> None:
    path = save_encoder(network, tmp_path / "mine.safetensors", {}, torch.float32)
    scorer = load_attributes(str(path))
    assert scorer.hash == AttributeScorer(network).hash
    for name, values in AttributeScorer(network)(images).items():
        assert torch.equal(scorer(images)[name], values)
    assert not any(p.requires_grad for p in scorer.parameters())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"nothing\.safetensors: no such file; set \"auto\""):
        load_attributes(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(AssetError, match='expected kind "attributes"'):
        load_attributes(str(ASSETS / "faces64/e4e.safetensors"))


def test_architectures_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="rising ages"):
        AttributeArchitecture(ages=(20, 20))
    with pytest.raises(ValueError, match="multiple of 16"):
        AttributeArchitecture(input_size=40)
    record = json.loads(json.dumps(SMALL.to_dict()))
    assert AttributeArchitecture(**record) == SMALL


# ---------------------------------------------------------------------- the bundled one


def test_the_bundled_scorer_is_small_and_its_card_describes_it() -> None:
    path = ASSETS / "faces64/attributes.safetensors"
    card = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= 2e6
    scorer = load_attributes()
    assert scorer.hash == card["hash"]
    trunk, _ = load_trunk(ASSETS / "trunk/trunk.safetensors")
    assert scorer.network.trunk.architecture == trunk.architecture

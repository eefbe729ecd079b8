"""The method `clcae`: its codes and map, edits that move both, what it refuses."""

from pathlib import Path

import pytest
import torch

from models.encoders.clcae import ClcaeArchitecture, ClcaeEncoder, load_clcae
from models.errors import AssetError
from models.inversion.base import SampleRng
from models.inversion.clcae import Clcae
from models.inversion.registry import load_method
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tests.conftest import make_tiny_generator
from tests.models.tiny_networks import save_network


def save(folder: Path, generator_hash: str, channels: int = 8) -> str:
    sizes = {"feature_channels": channels, "attention": "folded"}
    architecture = ClcaeArchitecture.tiny(make_tiny_generator(), **sizes)
    path = folder / "clcae.safetensors"
    return str(save_network(path, generator_hash, lambda: ClcaeEncoder(architecture)))


@pytest.fixture
def method(tmp_path: Path, tiny_generator: Generator) -> Clcae:
    path = save(tmp_path, weights_hash(tiny_generator))
    found = load_method("clcae", tiny_generator, checkpoint=path)
    assert isinstance(found, Clcae)
    return found


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_codes_and_map_are_the_encoders(method: Clcae, tmp_path: Path) -> None:
    found = method.invert(pictures(), None, SampleRng([0, 1]))
    encoder, sha256, _ = load_clcae(tmp_path / "clcae.safetensors", 8, 16)
    statistics = statistics_for(method.generator)
    with torch.no_grad():
        _, rows, features = encoder(pictures(), statistics.average_image)
    torch.testing.assert_close(found.w_plus, method.generator.latent_avg + rows)
    assert found.features is not None
    torch.testing.assert_close(found.features[5], features)
    assert method.hashes() == {"clcae": sha256}
    want = method.generator.synthesis(found.w_plus, features={5: features})
    torch.testing.assert_close(found.render(method.generator), want)


def test_an_edit_moves_the_map_by_the_generators_own_change(method: Clcae) -> None:
    """f + G5(edited w+) - G5(w+): no edit changes nothing, and a map of G's own edits as G does."""
    generator = method.generator
    found = method.invert(pictures(), None, SampleRng([0, 1]))
    assert found.features is not None
    same = found.edited(generator, found.w_plus)
    torch.testing.assert_close(same.features[5], found.features[5])
    w_plus = found.w_plus + 0.5
    moved = found.edited(generator, w_plus)
    before, after = (generator.activations(w, 5) for w in (found.w_plus, w_plus))
    torch.testing.assert_close(moved.features[5], found.features[5] + after - before)
    assert float((after - before).abs().max()) > 0.01
    # Where the map is the generator's own activation, the edit is the generator's own.
    own = type(found)(w_plus=found.w_plus, features={5: before}).edited(generator, w_plus)
    want = generator.synthesis(w_plus)
    torch.testing.assert_close(own.render(generator), want, atol=1e-5, rtol=1e-5)


def test_a_shift_before_the_blocks_makes_everything_again(method: Clcae) -> None:
    generator, average = method.generator, statistics_for(method.generator).average_image
    plain = method.invert(pictures(), None, SampleRng([0, 1]))
    still = method.invert_shifted(pictures(), torch.zeros(2, 16))
    torch.testing.assert_close(still.w_plus, plain.w_plus)
    torch.testing.assert_close(still.features[5], plain.features[5])
    shift = torch.full((2, 16), 0.5)
    moved = method.invert_shifted(pictures(), shift)
    with torch.no_grad():
        _, rows, features = method.encoder(pictures(), average, shift)
    w_plus = generator.latent_avg + rows
    torch.testing.assert_close(moved.w_plus, w_plus)
    change = generator.activations(w_plus, 5) - generator.activations(plain.w_plus, 5)
    torch.testing.assert_close(moved.features[5], features + change)


def test_a_picture_that_is_not_finite_fails_alone(method: Clcae) -> None:
    clean = method.invert(pictures(), None, SampleRng([0, 1]))
    broken = pictures()
    broken[1, 0, 3, 3] = float("nan")
    found = method.invert(broken, None, SampleRng([0, 1]))
    assert list(found.failures) == [1]
    assert found.features is not None
    assert not found.features[5][1].any()
    torch.testing.assert_close(found.features[5][0], clean.features[5][0])


def test_files_of_other_generators_are_refused(tmp_path: Path, tiny_generator: Generator) -> None:
    path = save(tmp_path, "f" * 64)
    with pytest.raises(AssetError, match=r"trained with generator ffffffffffff.*allow_other"):
        load_method("clcae", tiny_generator, checkpoint=path)
    load_method("clcae", tiny_generator, checkpoint=path, allow_other_generator=True)
    path = save(tmp_path, weights_hash(tiny_generator), channels=6)
    with pytest.raises(AssetError, match="maps of 6 channels, the generator has 8 at 16x16"):
        load_method("clcae", tiny_generator, checkpoint=path)

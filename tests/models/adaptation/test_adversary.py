"""The patch discriminator, its losses, and the moves of pictures before CLIP and trunk."""

import pytest
import torch

from models.adaptation.adversary import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    shifted,
)
from models.adaptation.views import crop_maps, moved, random_maps


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hinge_losses_by_hand() -> None:
    real = [torch.tensor([2.0, 0.5]).reshape(2, 1, 1, 1)]
    fake = [torch.tensor([-3.0, 0.25]).reshape(2, 1, 1, 1)]
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.25 + 0.625)
    assert generator_loss(fake).tolist() == [3.0, -0.25]


def test_it_learns_to_tell_two_textures_apart() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator((4, 6), (1.0, 2.0), hidden=8)
    adam = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.0, 0.99))

    def taps(mean: float) -> list[torch.Tensor]:
        return [torch.randn(4, 4, 8, 8) + mean, 2 * torch.randn(4, 6, 4, 4) + mean]

    for _ in range(60):
        loss = discriminator_loss(critic(taps(1.0)), critic(taps(-1.0)))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 1.5
    with torch.no_grad():
        real, fake = critic(taps(1.0)), critic(taps(-1.0))
        assert float((generator_loss(real) - generator_loss(fake)).max()) < 0
        assert [len(part) for part in real] == [4, 4]
        # Scales below the size of a patch have no say.
        assert len(critic([torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 2, 2)])) == 1


def test_shifts_move_whole_pixels() -> None:
    images = torch.randn(6, 3, 32, 32, generator=stream())
    found = shifted(images, stream(1))
    assert torch.equal(found, shifted(images, stream(1)))
    for before, after in zip(images, found, strict=True):
        hits = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if torch.equal(before[:, 2 + y : 30 + y, 2 + x : 30 + x], after[:, 2:30, 2:30])
        ]
        assert len(hits) == 1


def test_size_0_is_the_identity() -> None:
    images = torch.randn(2, 3, 16, 16, generator=stream())
    assert torch.allclose(moved(images, random_maps(2, 0.0, stream())), images, atol=1e-5)


def test_maps_are_small_and_mirror_half() -> None:
    maps = random_maps(2000, 0.1, stream())
    linear, shift = maps[:, :, :2], maps[:, :, 2]
    size = torch.linalg.det(linear).abs().sqrt()
    assert 1 / 1.1 <= float(size.min()) < 0.93
    assert 1.07 < float(size.max()) <= 1.1 + 1e-5
    assert 0.18 < float(shift.abs().max()) <= 0.2
    assert float((torch.linalg.det(linear) < 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    turn = torch.atan2(-linear[:, 0, 1], linear[:, 1, 1])
    assert 0.14 < float(turn.abs().max()) <= 0.1 * torch.pi / 2 + 1e-5


def test_parts_are_inside_the_picture() -> None:
    maps = crop_maps(200, torch.Generator().manual_seed(0))
    reach = maps[:, 0, 0].abs() + maps[:, 0, 2].abs()
    assert float(reach.max()) <= 1
    assert float((maps[:, 1, 1] + maps[:, 1, 2].abs()).max()) <= 1
    assert 0.4 <= float(maps[:, 1, 1].min()) < 0.45
    assert 0.75 < float(maps[:, 1, 1].max()) <= 0.8
    ramp = torch.linspace(-1, 1, 32).expand(200, 3, 32, 32)
    parts = moved(ramp, maps)
    is_mirrored = maps[:, 0, 0] < 0
    assert 60 < int(is_mirrored.sum()) < 140
    assert bool(((parts[:, 0, 0, -1] < parts[:, 0, 0, 0]) == is_mirrored).all())
    spread = (parts[:, 0, 0, -1] - parts[:, 0, 0, 0]).abs()
    torch.testing.assert_close(spread, 2 * maps[:, 1, 1], atol=0.05, rtol=0)

"""The table of losses: the identity row, by a file of dlib's face network."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.losses.dlib_face import DlibFace
from tasks.training.losses import PictureLosses


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_file(DlibFace().state_dict(), tmp_path / "face.safetensors")
    return str(tmp_path / "face.safetensors")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_identity_is_one_minus_the_cosine(weights: str, dtype: torch.dtype | None) -> None:
    losses = PictureLosses({"identity": 0.1}, "none", weights, dtype=dtype)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    renders = pictures.clone().requires_grad_()
    table = losses(renders, pictures)
    assert list(table) == ["identity"]
    torch.testing.assert_close(table["identity"], torch.zeros(2), atol=1e-3, rtol=0)

    network = losses.networks["identity"].network
    others = pictures.flip(3)
    a, b = (network(losses.networks["identity"].view(x)) for x in (others, pictures))
    wanted = 1 - (a * b).sum(1)
    found = losses(others.requires_grad_(), pictures)
    torch.testing.assert_close(found["identity"], wanted, atol=2e-3 if dtype else 1e-6, rtol=0.05)
    with torch.no_grad():
        scores = losses.scores(others, pictures)
    torch.testing.assert_close(scores["identity"], 1 - found["identity"].detach())
    losses.total(found).backward()
    assert others.grad is not None
    assert float(others.grad.abs().sum()) > 0


def test_without_a_network_there_is_no_row() -> None:
    losses = PictureLosses({"mse": 1.0, "identity": 0.1}, "none", None)
    assert losses.weights == {"mse": 1.0}
    assert list(losses(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64))) == ["mse"]

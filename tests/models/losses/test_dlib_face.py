"""dlib's face network: the file format, the square that it sees, dlib's own values."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.errors import AssetError
from models.losses import dlib_face
from models.losses.dlib_face import FACE_CHIP, FFHQ_CHIP, DlibFace, find_dlib, load_dlib
from models.losses.identity import Identity, load_identity
from tasks.input.align import FACE_POINTS
from tasks.input.ffhq import ffhq_points

RECORDED = """
-0.05817 0.13836 0.09698 -0.01777 -0.07794 -0.02016 -0.09485 -0.01805 0.10980 -0.05445 0.19658
-0.03290 -0.21962 0.02925 -0.05133 0.10990 -0.12007 -0.09952 -0.15378 -0.10383 0.05520 0.03419
-0.00491 0.02311 -0.10187 -0.26444 -0.06816 -0.08479 0.06801 -0.21093 0.01131 0.02202 -0.11016
-0.00572 -0.00366 0.02801 0.04020 -0.10962 0.15286 -0.03549 -0.17755 -0.04098 0.05551 0.27718
0.18586 0.06590 0.01509 -0.05881 0.05419 -0.27097 0.02559 0.13909 0.02412 0.14056 0.06361 -0.20002
0.01378 0.08037 -0.11617 0.04498 0.01999 -0.10367 -0.01945 -0.12685 0.24562 0.09097 -0.11457
-0.16585 0.12210 -0.17000 -0.06221 0.10828 -0.09873 -0.12215 -0.24225 0.04167 0.32998 0.15891
-0.15584 0.02791 -0.10296 -0.04490 -0.03574 0.07278 -0.05872 0.02038 -0.06676 0.05405 0.23874
-0.07480 0.02022 0.18627 -0.02517 -0.02463 -0.03773 0.05619 -0.11629 0.02788 -0.06694 0.01255
0.08239 -0.07298 0.00033 0.10540 -0.19070 0.12705 -0.02596 -0.04248 0.00135 0.00900 -0.06611
-0.03755 0.23731 -0.25271 0.20830 0.24531 0.09746 0.11051 0.04583 0.12804 0.01739 -0.02219 -0.13275
-0.05920 0.01509 -0.04552 -0.06343 0.03688
"""
"""`dlib.face_recognition_model_v1.compute_face_descriptor` (dlib 20.0.1) of `pattern()`."""


@pytest.fixture(scope="module")
def identity() -> Identity:
    try:
        return load_identity("dlib")
    except AssetError as error:
        pytest.skip(str(error))


def pattern() -> torch.Tensor:
    y, x = np.mgrid[:150, :150]
    planes = [(x * 7 + y * k) % 251 // (1 + (x + y) // 90) + 20 * (k - 3) for k in (3, 5, 8)]
    return torch.from_numpy(np.stack(planes).clip(0, 255)).float()[None] / 127.5 - 1


def faces(shared, file: str, count: int = 255) -> torch.Tensor:
    """So many pictures, spread over a file."""
    table = pq.read_table(shared / f"data/faces/{file}-000.parquet", columns=["image"])
    rows = table["image"].to_pylist()
    pixels = [
        np.array(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        for row in rows[:: len(rows) // count][:count]
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def embed(identity: Identity, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([identity.features(part) for part in images.split(64)])


def halved(images: torch.Tensor) -> torch.Tensor:
    small = F.avg_pool2d(images, 2)
    return F.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)


# ---------------------------------------------------------------------- dlib's values


def test_the_descriptor_is_dlibs(identity):
    wanted = torch.tensor([float(value) for value in RECORDED.split()])
    with torch.no_grad():
        found = identity.network.descriptor(pattern())
    assert float((found[0] - wanted).norm()) < 1e-3


def test_persons_are_told_apart(identity, shared):
    pictures = faces(shared, "val64")
    first, again = embed(identity, pictures), embed(identity, halved(pictures))
    strangers = first @ first.T
    strangers.fill_diagonal_(-1)
    same = identity.compare(first, again)
    assert float(same.mean()) == pytest.approx(0.932, abs=0.01)
    assert float(strangers.amax(1).mean()) == pytest.approx(0.572, abs=0.01)
    others = strangers[~torch.eye(255, dtype=torch.bool)]
    assert abs(float(others.mean())) < 0.02
    assert (again @ first.T).argmax(1).tolist() == list(range(255))


def test_every_size_shows_the_same_person(identity, shared):
    small, large = faces(shared, "val64", 32), faces(shared, "val128", 32)
    assert float(identity(small, large).min()) > 0.95
    enlarged = F.interpolate(large, size=512, mode="bicubic").clamp(-1, 1)
    assert float(identity.compare(identity.features(enlarged), identity.features(large)).min()) > (
        0.99
    )


def test_bfloat16_keeps_the_similarity(identity, shared):
    pictures = faces(shared, "val64", 32)
    wanted = identity(pictures, halved(pictures))
    with torch.autocast("cpu", torch.bfloat16):
        found = identity(pictures, halved(pictures))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0)


def test_descent_brings_the_person_back(identity, shared):
    """The loss as training uses it: down its gradient a blurred face becomes the person again."""
    wanted = faces(shared, "val64", 4)
    found = F.interpolate(F.avg_pool2d(wanted, 8), size=64, mode="bilinear").requires_grad_()
    before = float(identity(found.detach(), wanted).mean())
    optimiser = torch.optim.Adam([found], 0.02)
    for _ in range(8):
        optimiser.zero_grad()
        (1 - identity(found, wanted)).mean().backward()
        optimiser.step()
    assert before < 0.4
    assert float(identity(found.detach(), wanted).mean()) > before + 0.3


def test_faces_lie_around_the_mean(identity, shared):
    """Of 255 faces that it was not made from; their own spread is 0.6 about it."""
    with torch.no_grad():
        parts = [
            identity.network.descriptor(identity.view(part))
            for part in faces(shared, "val64").split(64)
        ]
    found = torch.cat(parts) - identity.network.mean
    assert float(found.mean(0).norm()) < 0.1
    assert float(found.norm(dim=1).mean()) == pytest.approx(0.61, abs=0.03)


def test_a_converted_file_is_the_same_network(identity, tmp_path, monkeypatch):
    path = tmp_path / "face.safetensors"
    monkeypatch.setattr("sys.argv", ["dlib_face", str(path)])
    dlib_face.main()
    with torch.no_grad():
        found, wanted = (n(pattern()) for n in (load_identity(path).network, identity.network))
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


# ---------------------------------------------------------------------- the file format


def integer(value: int) -> bytes:
    data = value.to_bytes(4, "little").rstrip(b"\0")
    return bytes([len(data)]) + data


def tensor(values: np.ndarray, shape: tuple[int, ...]) -> bytes:
    return b"".join(map(integer, (2, *shape))) + values.astype("<f4").tobytes()


def dat(changed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A file of dlib's layout with random weights; and those weights."""
    random = np.random.default_rng(0)
    data, weights = b"\1\1\1\rloss_metric_2\3\n\xd7\xa3\x81\x1c", {}
    with torch.device("meta"):
        convs = [
            (name, module.weight.shape)
            for name, module in DlibFace().named_modules()
            if isinstance(module, torch.nn.Conv2d)
        ]
    for name, shape in convs:
        kernel = random.normal(0, 0.02, (int(np.prod(shape)) + shape[0] + changed, 1))
        affine = random.normal(1, 0.1, (2, shape[0]))
        weights[name], weights[f"{name}.affine"] = kernel, affine
        data += b"\1\5con_4" + tensor(kernel, (len(kernel), 1, 1, 1)) + integer(shape[0])
        data += b"\1\7affine_" + tensor(affine, (2, shape[0], 1, 1)) + b"\1\5relu_"
    weights["embed"] = random.normal(0, 0.1, (256, 128))
    data += b"\1\4fc_2" + integer(128) + integer(256) + tensor(weights["embed"], (256, 128, 1, 1))
    return data + b"\1\1", weights


def test_layers_are_read_in_order_and_affines_folded(tmp_path):
    path = tmp_path / "face.dat"
    data, weights = dat()
    path.write_bytes(data)
    network = load_dlib(path)
    x = torch.rand(1, 64, 9, 9, generator=torch.Generator().manual_seed(0))
    kernel, affine = weights["blocks.4.conv2"], torch.tensor(weights["blocks.4.conv2.affine"])
    plain = torch.nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(
        {
            "weight": torch.tensor(kernel[:-64]).reshape(64, 64, 3, 3).float(),
            "bias": torch.tensor(kernel[-64:, 0]).float(),
        }
    )
    gain, shift = affine.float().reshape(2, 1, 64, 1, 1)
    torch.testing.assert_close(
        network.blocks[4].conv2(x), plain(x) * gain + shift, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(network.embed.weight, torch.tensor(weights["embed"]).float().T)
    assert float(network.mean.norm()) == pytest.approx(1.32, abs=0.02)
    assert not any(p.requires_grad for p in network.parameters())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.dat"
    for data in (b"no", dat(changed=1)[0], dat()[0][:200_001]):
        path.write_bytes(data)
        with pytest.raises(AssetError, match=r"other\.dat"):
            load_identity(path)
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(AssetError, match="cannot read"):
        load_identity(path)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dlib_face, "PACKAGE", "no_such_package")
    with pytest.raises(AssetError, match=r"no_such_package with .*dat is not installed; pip"):
        find_dlib()


def test_ffhq_shows_the_same_part_of_the_face():
    """The similarity between the two templates maps one square onto the other."""
    ours, ffhq = (p @ (1, 1j) for p in (np.array(FACE_POINTS), ffhq_points(np.array(FACE_POINTS))))
    centred = ours - ours.mean()
    turn = (centred.conj() * (ffhq - ffhq.mean())).sum() / (abs(centred) ** 2).sum()
    corner = turn * (FACE_CHIP.left + 1j * FACE_CHIP.top - ours.mean()) + ffhq.mean()
    assert abs(turn.imag) < 1e-3
    assert FFHQ_CHIP.side == pytest.approx(turn.real * FACE_CHIP.side, abs=1e-3)
    assert FFHQ_CHIP.left + 1j * FFHQ_CHIP.top == pytest.approx(corner, abs=1e-3)

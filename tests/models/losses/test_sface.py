"""The judge of identity: dlib's opposite number, which no loss sees."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.errors import AssetError
from models.losses import sface
from models.losses.sface import SFace, load_sface


@pytest.fixture(scope="module")
def judge() -> SFace:
    try:
        return load_sface()
    except AssetError as error:
        pytest.skip(str(error))


def test_persons_are_told_apart(judge, shared):
    rows = pq.read_table(shared / "data/faces/val64-000.parquet")["image"].to_pylist()
    pixels = [np.array(Image.open(io.BytesIO(r["bytes"])).convert("RGB")) for r in rows[::4]]
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    halved = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bicubic").clamp(-1, 1)
    first, again = judge.features(pictures), judge.features(halved)
    strangers = (first @ first.T)[~torch.eye(64, dtype=torch.bool)]
    assert float(judge.compare(first, again).mean()) == pytest.approx(0.93, abs=0.015)
    assert float(strangers.mean()) == pytest.approx(0.195, abs=0.03)
    assert (again @ first.T).argmax(1).tolist() == list(range(64))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(64))


def test_colours_are_in_the_order_that_the_network_learned(judge, shared):
    """Red and blue swapped, the network knows people less well at a quarter of the resolution."""
    rows = pq.read_table(shared / "data/faces/val64-000.parquet")["image"].to_pylist()
    pixels = [np.array(Image.open(io.BytesIO(r["bytes"])).convert("RGB")) for r in rows[::8]]
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    soft = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4, mode="bicubic").clamp(-1, 1)
    right = float(judge(pictures, soft).mean())
    assert right > float(judge(pictures.flip(1), soft.flip(1)).mean()) + 0.01


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sface, "PACKAGE", "no_such_package")
    with pytest.raises(AssetError, match=r"no_such_package .* not installed; pip install"):
        load_sface()
    package = tmp_path / "no_runtime_face"
    (package / "models").mkdir(parents=True)
    (package / sface.FILE).write_text(json.dumps({}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sface, "PACKAGE", "no_runtime_face")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(AssetError, match=r"identity_judge: import of onnx .*; pip install"):
        load_sface()

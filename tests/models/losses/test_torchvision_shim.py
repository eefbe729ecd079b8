"""torchvision imports beside a CPU build of PyTorch."""

import torch

from models.losses import torchvision_shim


def test_torchvision_and_lpips_import():
    torchvision_shim.ensure_torchvision()
    torchvision_shim.ensure_torchvision()
    import lpips
    import torchvision

    assert torchvision.ops.nms is not None
    assert lpips.LPIPS is not None
    assert "nms" in str(torch.ops.torchvision.nms.default._schema)


def test_a_library_that_does_not_load_is_told(tmp_path):
    assert not torchvision_shim._compiled_library_loads(tmp_path)
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert not torchvision_shim._compiled_library_loads(tmp_path)

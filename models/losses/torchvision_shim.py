"""Make `import torchvision` work beside a CPU build of PyTorch.

The torchvision wheel that pairs with our PyTorch is a CUDA build. On a CPU-only PyTorch its
compiled library cannot be loaded, and the import dies with "operator torchvision::nms does not
exist": its Python code registers fake kernels for operators that the library would have defined.
Declaring the two operators' schemas first is enough: nobody here calls them. `lpips` and
`transformers` import torchvision, so `ensure_torchvision()` must run before either.
"""

import importlib.util
import sys
from pathlib import Path

import torch

SCHEMAS = ("nms", "qnms")

_library: torch.library.Library | None = None


def ensure_torchvision() -> None:
    """Declare torchvision's operators where its own compiled library does not load; idempotent.

    Does nothing when torchvision is imported already, or its library loads, or it is not installed.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _compiled_library_loads(Path(spec.origin).parent):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in SCHEMAS:
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _compiled_library_loads(package: Path) -> bool:
    for path in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError):
            continue
        return True
    return False

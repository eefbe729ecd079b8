"""The demo's sample shard: pictures that are free to ship, and three broken files.

Nothing is stored in the repository: faces are drawn by the bundled generator from fixed seeds, and
the one photograph comes with scikit-image. Two calls on one machine write the same bytes.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut

from models.checkpoints.load import load_generator
from models.inversion.base import SampleRng, sample_seed
from models.pictures import to_bytes
from models.stylegan2.generator import Generator
from tasks.input.align import FACE, align
from tasks.job import InputConfig
from tasks.work.device import fixed_threads

DRAWN = 24
TRUNCATION_PSI = 0.7
SEED = 2026
SHARD_NAME = "demo-000000.tar"

ASTRONAUT_POINTS_PX = (
    (203.5, 100.8),
    (246.3, 103.0),
    (225.8, 126.3),
    (204.5, 140.5),
    (243.3, 142.0),
)
"""Eyes, nose tip and mouth corners (left first) in `skimage.data.astronaut()`, (x, y)."""

TERMS = """\
The pictures in {shard}
{line}

drawn-00 .. drawn-{last:02d}  Not photographs: drawn by the generator {generator} from seed {seed}
                    (truncation {psi}). Terms of that generator:
                    {terms}
astronaut           Eileen Collins, photographed by NASA (Great Images in NASA), public domain;
                    carried by scikit-image as `skimage.data.astronaut`, here aligned and reduced.
broken-*            Three files that are broken on purpose: a truncated PNG, a text with the name
                    of a JPEG, and an empty file.
"""


def write_demo_shard(folder: Path, *, generator: Generator | None = None) -> str:
    """Write one WebDataset tar of 25 pictures and three broken files, and TERMS.md beside it.

    Args:
        folder: where to write; made if missing, files of an earlier call are replaced.
        generator: draws the faces; the bundled `faces64` by default.

    Returns:
        The path of the tar, ready as the input of `refinery invert`.

    Raises:
        AssetError: the bundled generator is missing.
    """
    if generator is None:
        generator = load_generator("faces64")
    size = generator.resolution
    members = {
        f"drawn-{index:02d}.png": _png(pixels)
        for index, pixels in enumerate(draw_faces(generator, DRAWN))
    }
    photograph = _png(aligned_astronaut(size))
    members["astronaut.png"] = photograph
    members["broken-truncated.png"] = photograph[: len(photograph) // 2]
    members["broken-text.jpg"] = b"This is a text, whatever its name says.\n"
    members["broken-empty.png"] = b""

    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / SHARD_NAME
    _write_tar(shard, members)
    provenance = getattr(generator, "provenance", None) or {}
    (folder / "TERMS.md").write_text(
        TERMS.format(
            shard=SHARD_NAME,
            line="-" * (len(SHARD_NAME) + 16),
            last=DRAWN - 1,
            generator=provenance.get("source", "given by the caller"),
            seed=SEED,
            psi=TRUNCATION_PSI,
            terms=provenance.get("terms", "as the caller got it"),
        )
    )
    return str(shard)


@torch.no_grad()
def draw_faces(generator: Generator, count: int) -> np.ndarray:
    """Samples from fixed seeds, uint8 [count H W 3]; sample i does not depend on `count`."""
    rng = SampleRng([sample_seed(SEED, f"drawn-{index:02d}") for index in range(count)])
    # One at a time and in one thread: batches and threads round differently, and the bytes are to
    # be the same for any count on any number of cores.
    with fixed_threads(1):
        z = rng.randn(generator.z_dim)
        w_plus = [generator.mapping(row[None], truncation_psi=TRUNCATION_PSI) for row in z]
        images = [generator.synthesis(w) for w in w_plus]
    return to_bytes(torch.cat(images)).numpy()


def aligned_astronaut(size: int) -> np.ndarray:
    """The photograph's face on the template of the bundled generator, uint8 [size size 3]."""
    picture = astronaut()
    landmarks = np.asarray(ASTRONAUT_POINTS_PX) / picture.shape[0]
    input = InputConfig(fit="align", template=FACE)
    (crop,) = align(Image.fromarray(picture), landmarks, input, size)
    assert crop.picture is not None
    return crop.picture


def write_demo_photograph(folder: Path) -> str:
    """The whole photograph of the demo's one real face, neither cropped nor aligned.

    Returns:
        The folder, ready as the input of `refinery invert --align`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "astronaut.png").write_bytes(_png(astronaut()))
    return str(folder)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar whose bytes depend on the members alone: fixed times, owners and order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))

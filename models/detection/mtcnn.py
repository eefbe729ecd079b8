"""MTCNN (Zhang et al., "Joint face detection and alignment using multi-task cascaded convolutional
networks", arXiv 1604.02878): three small networks, each looking closer at what the last one found.

The weights come with the package `mtcnn` (MIT), whose code is not run. Two things are not in the
paper. Each face found is looked at once more, turned upright: its points get more exact and its
score tells a face from what only looked like one at an angle. And a picture without a face is
turned by 90, 180 and 270 degrees, since cameras forget to say how they were held.

All places are complex numbers x + iy in pixels of the picture, (0, 0) its upper left corner.

Legend: N candidates, S side of a network's input.
"""

import hashlib
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Complex128, Float32, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from models.errors import AssetError
from models.losses.face_packages import packaged

PACKAGE = "mtcnn"
INSTALL = "pip install -c constraints.txt 'style-refinery[faces]'"

FACTOR = 0.709
"""From one size of the first network's pyramid to the next: half the area."""
CELL, STRIDE = 12, 2
"""What the first network sees of a place, and from place to place, in its pixels."""
THRESHOLDS = (0.6, 0.7, 0.7)
LEAST_SCORE = 0.9
"""Of the last look at a face turned upright."""
LARGEST_SIDE = 1500
"""Of the first network's largest picture: bounds time and memory, and with it how small a face of a
very large picture can be (12 / 1500 of its longer side)."""
MAX_CANDIDATES = 4096
"""Kept of one size of the pyramid, best first: a crowd has a few hundred faces."""
UPRIGHT_POINTS = np.array([0.32 + 0.4j, 0.68 + 0.4j, 0.5 + 0.62j, 0.33 + 0.755j, 0.67 + 0.755j])
"""Where the last network's square has the five points of an upright face: means over held-out
faces, made symmetric."""


class CascadeStage(NamedTuple):
    """How a network's layers follow each other.

    Attributes:
        pools: size of the max pooling (of stride 2) after each 3x3 or 2x2 convolution; 0 for none.
        has_dense: a hidden layer before the heads.
        sha256: of the weights' file.
    """

    file: str
    side: int
    pools: tuple[int, ...]
    has_dense: bool
    sha256: str


STAGES = (
    CascadeStage(
        "pnet.lz4",
        CELL,
        (2, 0, 0),
        False,
        "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    ),
    CascadeStage(
        "rnet.lz4",
        24,
        (3, 3, 0),
        True,
        "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    ),
    CascadeStage(
        "onet.lz4",
        48,
        (3, 3, 2, 0),
        True,
        "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
    ),
)


@dataclass(frozen=True)
class FoundFace:
    """A face in a picture.

    Attributes:
        points: eyes, nose tip and mouth corners, left ones first as the viewer sees the upright
            face: float64 [5 2], (x, y) in pixels of the picture.
        box: left, top, right, bottom in pixels; it may reach out of the picture.
        score: 0..1.
    """

    points: Float64[np.ndarray, "5 2"]
    box: tuple[float, float, float, float]
    score: float

    @property
    def side(self) -> float:
        """The longer side of the box."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


class Mtcnn:
    """Finds faces in one picture at a time; all candidates of a stage are one batch.

    It computes on the CPU, in the thread that calls it, which it sets to one thread of PyTorch: the
    same picture gives the same bytes whatever else runs.
    """

    hash = hashlib.sha256("".join(stage.sha256 for stage in STAGES).encode()).hexdigest()
    """Of the weights."""

    def __init__(self, weights: Sequence[Sequence[Tensor]]) -> None:
        self._weights = weights

    def find(self, picture: Image.Image, min_face: float = 40.0) -> list[FoundFace]:
        """The faces of an upright RGB picture, largest first.

        Args:
            min_face: side of the smallest face looked for, pixels; at least 12 / 1500 of the
                picture's longer side.
        """
        torch.set_num_threads(1)
        for turns in range(4):
            turned = picture if turns == 0 else picture.transpose(TURNS[turns - 1])
            found = self._find(Mips(turned), min_face)
            if found:
                return [_turned_back(face, picture.size, turns) for face in found]
        return []

    def look(
        self, picture: Image.Image, corner: complex, across: complex
    ) -> tuple[Complex128[np.ndarray, "5"], float]:
        """The five points of a face that is known to fill a square, and how sure it is a face.

        Args:
            corner, across: of the square: its upper left corner, and from there to the upper right.
        """
        torch.set_num_threads(1)
        score, _, points = self._looked(Mips(picture), np.array([corner]), np.array([across]))
        return points[0], float(score[0])

    def _find(self, mips: "Mips", min_face: float) -> list[FoundFace]:
        corner, side = self._proposed(mips, min_face)
        corner, side = self._refined(mips, corner, side)
        if not len(side):
            return []
        score, boxes, points = self._looked(mips, corner, side.astype(complex))
        kept = np.flatnonzero(score > THRESHOLDS[2])
        kept = kept[suppressed(boxes[kept], score[kept], 0.7, is_of_smaller=True)]
        # Once more, turned upright.
        boxes, points = boxes[kept], points[kept]
        corner, across = upright_squares(points)
        score, _, points = self._looked(mips, corner, across)
        sides = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        best = [n for n in np.argsort(-sides, kind="stable") if score[n] > LEAST_SCORE]
        return [
            FoundFace(
                points=as_points(points[n]),
                box=tuple(map(float, boxes[n])),  # type: ignore[arg-type]
                score=float(score[n]),
            )
            for n in _without_doubles(best, points)
        ]

    def _proposed(
        self, mips: "Mips", min_face: float
    ) -> tuple[Complex128[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
        """Squares, as corners and sides, that may hold a face."""
        width, height = mips.size
        scale = min(CELL / min_face, LARGEST_SIDE / max(width, height))
        boxes: list[np.ndarray] = [np.zeros((0, 4))]
        scores: list[np.ndarray] = [np.zeros(0)]
        while min(width, height) * scale >= CELL:
            at_scale = self._proposed_at(mips.scaled(scale), scale)
            boxes.append(at_scale[0])
            scores.append(at_scale[1])
            scale *= FACTOR
        everything = np.concatenate(boxes)
        return _squares(everything[suppressed(everything, np.concatenate(scores), 0.7)])

    def _proposed_at(
        self, picture: Image.Image, scale: float
    ) -> tuple[Float64[np.ndarray, "N 4"], Float64[np.ndarray, " N"]]:
        shifts, logits = self._run(0, _normalised([picture]))
        scores = logits.softmax(1)[0, 1]
        row, column = torch.nonzero(scores >= THRESHOLDS[0], as_tuple=True)
        score = scores[row, column].double().numpy()
        start = np.stack([column.numpy(), row.numpy()], axis=1) * float(STRIDE)
        boxes = np.concatenate([start, start + CELL], axis=1) / scale
        kept = np.argsort(-score, kind="stable")[:MAX_CANDIDATES]
        kept = kept[suppressed(boxes[kept], score[kept], 0.5)]
        moved = shifts[0, :, row, column].T.double().numpy()
        return _moved(boxes[kept], moved[kept]), score[kept]

    def _refined(
        self, mips: "Mips", corner: np.ndarray, side: np.ndarray
    ) -> tuple[Complex128[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
        if not len(side):
            return corner, side
        patches = mips.patches(corner, side.astype(complex), STAGES[1].side)
        shifts, logits = self._run(1, _normalised(patches))
        score = logits.softmax(1)[:, 1].double().numpy()
        kept = np.flatnonzero(score > THRESHOLDS[1])
        boxes = _boxes(corner, side)[kept]
        best = suppressed(boxes, score[kept], 0.7)
        return _squares(_moved(boxes[best], shifts.double().numpy()[kept][best]))

    def _looked(
        self, mips: "Mips", corner: np.ndarray, across: np.ndarray
    ) -> tuple[
        Float64[np.ndarray, " N"], Float64[np.ndarray, "N 4"], Complex128[np.ndarray, "N 5"]
    ]:
        """The last network's score, box and points of squares that may be turned."""
        if not len(corner):
            return np.zeros(0), np.zeros((0, 4)), np.zeros((0, 5), complex)
        patches = mips.patches(corner, across, STAGES[2].side)
        shifts, points, logits = self._run(2, _normalised(patches))
        x, y = points.double().numpy().reshape(-1, 2, 5).transpose(1, 0, 2)
        places = corner[:, None] + across[:, None] * (x + 1j * y)
        boxes = _moved(_boxes(corner, np.abs(across)), shifts.double().numpy())
        return logits.softmax(1)[:, 1].double().numpy(), boxes, places

    @torch.inference_mode()
    def _run(self, stage: int, x: Float32[Tensor, "N 3 S S2"]) -> list[Tensor]:
        """The heads: shifts of the box's corners in its sides, points in 0..1 of the box (x, then
        y; the last network's alone), logits of (no face, face)."""
        layers = iter(self._weights[stage])
        for pool in STAGES[stage].pools:
            x = F.prelu(F.conv2d(x, next(layers), next(layers)), next(layers))
            x = F.max_pool2d(x, pool, 2, ceil_mode=True) if pool else x
        if not STAGES[stage].has_dense:
            return [F.conv2d(x, weight, next(layers)) for weight in layers]
        x = x.permute(0, 3, 2, 1).flatten(1)
        x = F.prelu(F.linear(x, next(layers), next(layers)), next(layers))
        return [F.linear(x, weight, next(layers)) for weight in layers]


class Mips:
    """A picture and its halves, to sample any square of it without aliasing."""

    def __init__(self, picture: Image.Image) -> None:
        self.size = picture.size
        self._halves = [picture]

    def _half(self, number: int) -> Image.Image:
        while len(self._halves) <= number and min(self._halves[-1].size) > 1:
            self._halves.append(self._halves[-1].reduce(2))
        return self._halves[min(number, len(self._halves) - 1)]

    def scaled(self, scale: float) -> Image.Image:
        """The whole picture `scale` times as large."""
        size = (math.ceil(self.size[0] * scale), math.ceil(self.size[1] * scale))
        source = self._half(max(0, math.floor(-math.log2(scale))))
        how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
        return source.resize(size, how)

    def patches(self, corner: np.ndarray, across: np.ndarray, side: int) -> list[Image.Image]:
        """Squares as pictures of `side` pixels; what lies outside of the picture is black."""
        return [self._patch(c, a, side) for c, a in zip(corner, across, strict=True)]

    def _patch(self, corner: complex, across: complex, side: int) -> Image.Image:
        density = abs(across) / side
        number = max(0, math.floor(math.log2(max(density, 1e-9))))
        source = self._half(number)
        x, y = source.width / self.size[0], source.height / self.size[1]
        step = across / (2 * side)
        matrix = (
            *(step.real * x, -step.imag * x, corner.real * x),
            *(step.imag * y, step.real * y, corner.imag * y),
        )
        sampled = source.transform(
            (2 * side, 2 * side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        return sampled.reduce(2)


def suppressed(
    boxes: Float64[np.ndarray, "N 4"],
    scores: Float64[np.ndarray, " N"],
    most: float,
    is_of_smaller: bool = False,
) -> Int64[np.ndarray, " K"]:
    """Rows that remain, best first, where no box overlaps a better one by more than `most`.

    Args:
        most: area of the intersection over that of the union.
        is_of_smaller: over that of the smaller of the two instead.
    """
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    waiting, kept = np.argsort(-scores, kind="stable"), []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[waiting, :2])
        high = np.minimum(boxes[best, 2:], boxes[waiting, 2:])
        both = np.prod(np.clip(high - low, 0, None), axis=1)
        least = np.minimum(area[best], area[waiting])
        whole = least if is_of_smaller else area[best] + area[waiting] - both
        waiting = waiting[both <= most * whole]
    return np.array(kept, dtype=np.int64)


def upright_squares(
    points: Complex128[np.ndarray, "N 5"],
) -> tuple[Complex128[np.ndarray, " N"], Complex128[np.ndarray, " N"]]:
    """Corner and upper side of squares in which faces stand as in `UPRIGHT_POINTS`: least squares
    over similarities."""
    model = UPRIGHT_POINTS - UPRIGHT_POINTS.mean()
    centre = points.mean(1)
    across = (points - centre[:, None]) @ model.conj() / np.sum(np.abs(model) ** 2)
    return centre - across * UPRIGHT_POINTS.mean(), across


def _without_doubles(order: Sequence[Any], points: np.ndarray) -> list[Any]:
    """Two looks may end at one face: the centres of two faces are an eye distance apart."""
    kept: list[Any] = []
    for n in order:
        eyes = abs(points[n, 1] - points[n, 0])
        if all(abs(points[n].mean() - points[other].mean()) > eyes for other in kept):
            kept.append(n)
    return kept


TURNS = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)


def _turned_back(face: FoundFace, size: tuple[int, int], turns: int) -> FoundFace:
    """A face of a picture that was turned so often by 90 degrees to the left, in the picture."""
    if turns == 0:
        return face
    width, height = size
    turn = 1j**turns
    origin = (0, width, width + 1j * height, 1j * height)[turns]
    places = turn * (face.points[:, 0] + 1j * face.points[:, 1]) + origin
    left, top, right, bottom = face.box
    corners = turn * np.array([left + 1j * top, right + 1j * bottom]) + origin
    low, high = as_points(corners).min(0), as_points(corners).max(0)
    box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    return FoundFace(as_points(places), box, face.score)


def as_points(places: np.ndarray) -> Float64[np.ndarray, "K 2"]:
    """x + iy to (x, y)."""
    return np.stack([np.real(places), np.imag(places)], axis=1)


def _boxes(corner: np.ndarray, side: np.ndarray) -> Float64[np.ndarray, "N 4"]:
    x, y = as_points(corner).T
    return np.stack([x, y, x + side, y + side], axis=1)


def _squares(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners and sides of squares about the same centres, as large as the longer sides."""
    side = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return (x - side / 2) + 1j * (y - side / 2), side


def _moved(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + shifts * np.concatenate([size, size], axis=1)


def _normalised(pictures: Sequence[Image.Image]) -> Float32[Tensor, "N 3 H W"]:
    pixels: UInt8[np.ndarray, "N H W 3"] = np.stack([np.asarray(each) for each in pictures])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127.5) / 128


@lru_cache(maxsize=1)
def load_mtcnn() -> Mtcnn:
    """The detector with the weights of the installed package.

    Raises:
        AssetError: it is not installed, or has other weights; says what to install.
    """
    return Mtcnn([_read(stage) for stage in STAGES])


def _read(stage: CascadeStage) -> list[Tensor]:
    path = packaged(PACKAGE, f"assets/weights/{stage.file}", "the detector mtcnn", INSTALL)
    if hashlib.sha256(path.read_bytes()).hexdigest() != stage.sha256:
        raise AssetError(
            f"the detector mtcnn: {path} holds other weights than those of mtcnn 1.0.0; {INSTALL}"
        )
    try:
        # A pickle, and so a program: it is opened because its bytes are the known ones.
        arrays = importlib.import_module("joblib").load(path)
    except ImportError as error:
        raise AssetError(f"the detector mtcnn: {error}; {INSTALL}") from error
    return [_as_torch(torch.from_numpy(array)) for array in arrays]


def _as_torch(value: Tensor) -> Tensor:
    """TensorFlow's layouts: kernels [k k I O], matrices [I O], slopes [1 1 O]."""
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1).contiguous()
    return value.T.contiguous() if value.ndim == 2 else value.reshape(-1)

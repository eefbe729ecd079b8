"""Detectors of faces against known landmarks: `python -m benchmarks.detectors SHARED_DATA`.

Faces of known five points are put into larger photographs at several sizes and turns. A face counts
as found where all of a detector's points are within a quarter of the eye distance on average. Which
detectors are measured depends on what is installed: dlib wants `dlib-bin` and
`face-recognition-models`, facenet-pytorch 2.6.0 is installed with --no-deps.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.detection.mtcnn import load_mtcnn
from models.losses.face_packages import packaged
from models.losses.torchvision_shim import ensure_torchvision
from tasks.benchmark.machine import describe_machine
from tests.pipeline.photo_scenes import BACKGROUNDS, Square, paste_square, real_squares

PAGE = Path(__file__).with_name("detectors.md")
SIZE = (1200, 900)
CASES = [(side, 0) for side in (60, 160, 400)]
CASES += [(160, turn) for turn in (15, 30, 45, 90, 180)]
FOUND = 0.25
Find = Callable[[Image.Image], list[np.ndarray]]
"""A photograph to the five points of each face, pixels."""

INTRODUCTION = """# Detectors of faces

`python -m benchmarks.detectors ../shared/data` wrote this page: {photos} photographs of 1200 x
900 pixels for each row, with {faces} held-out faces (128 px, tightly cropped) of known five
points in them, as squares of the given side, turned as given. Recall is the share of faces found,
the error the mean distance of their points in eye distances, false finds are per photograph, and
the pace is per second of processor time. All look for faces from about 40 pixels.

- **mtcnn** is what `--align` uses: the published weights, our own cascade, one more look at each
  face turned upright, and a photograph without an upright face turned by 90, 180 and 270 degrees.
- **facenet-pytorch** 2.6.0 runs the same weights. Its wheel asks for a NumPy and a PyTorch of
  2024, and its boxes need an operator that torchvision's wheel has on GPU builds alone (here
  replaced by its own NumPy form).
- **dlib** is its frontal detector (histograms of gradients) and its 68 points, of which five are
  made; "x2" looks at the photograph at twice its size, for faces below 80 pixels. The 68 points
  come from a data set that excludes commercial use.

{machine}.
"""
CONCLUSION = """
mtcnn was taken for this: faces on their side and upside down, small faces, the pace.
"""


def ours() -> Find:
    return lambda photo: [face.points for face in load_mtcnn().find(photo)]


def facenet() -> Find:
    """facenet-pytorch's cascade, its non-maximum suppression replaced by its own NumPy one."""
    ensure_torchvision()
    cascade = importlib.import_module("facenet_pytorch.models.utils.detect_face")

    def suppress(
        boxes: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, most: float
    ) -> torch.Tensor:
        return cascade.batched_nms_numpy(boxes, scores, rows, most, "Union")

    cascade.batched_nms = suppress  # pyright: ignore[reportAttributeAccessIssue]
    network = importlib.import_module("facenet_pytorch").MTCNN(keep_all=True, min_face_size=40)

    def find(photo: Image.Image) -> list[np.ndarray]:
        _, _, points = network.detect(photo, landmarks=True)
        return [] if points is None else [np.asarray(each, dtype=float) for each in points]

    return find


def dlib(upsample: int) -> Find:
    library = importlib.import_module("dlib")
    detector = library.get_frontal_face_detector()
    file = "models/shape_predictor_68_face_landmarks.dat"
    predictor = library.shape_predictor(str(packaged("face_recognition_models", file, "dlib")))

    def find(photo: Image.Image) -> list[np.ndarray]:
        pixels = np.array(photo)
        return [_five(predictor(pixels, box)) for box in detector(pixels, upsample)]

    return find


def _five(shape: object) -> np.ndarray:
    """Middles of the eyes, tip of the nose and corners of the mouth of 68 points."""
    z = np.array([(point.x + 0.5, point.y + 0.5) for point in shape.parts()])  # type: ignore[attr-defined]
    return np.stack([z[36:42].mean(0), z[42:48].mean(0), z[30], z[48], z[54]])


DETECTORS: dict[str, Callable[[], Find]] = {
    "mtcnn": ours,
    "facenet-pytorch": facenet,
    "dlib": lambda: dlib(0),
    "dlib x2": lambda: dlib(1),
}


def photographs(
    squares: list[Square], side: int, turn: int, count: int
) -> Iterator[tuple[Image.Image, list[np.ndarray]]]:
    """Photographs with two or three faces, and their points."""
    rng = np.random.default_rng(side * 1000 + turn)
    faces = 2 if side > 300 else 3
    for _ in range(count):
        photo = Image.fromarray(BACKGROUNDS[rng.integers(len(BACKGROUNDS))]()).resize(SIZE)
        across = side * np.exp(1j * np.radians(turn))
        places = []
        for number in range(faces):
            picture, points = squares[rng.integers(len(squares))]
            centre = complex(SIZE[0] * (number + 0.5) / faces, SIZE[1] / 2)
            places.append(paste_square(photo, picture, across, centre, points))
        yield photo, places


def measured(find: Find, photos: list[tuple[Image.Image, list[np.ndarray]]]) -> dict[str, float]:
    errors: list[float] = []
    wrong = total = 0
    started = time.process_time()
    answers = [find(photo) for photo, _ in photos]
    seconds = time.process_time() - started
    for found, (_, places) in zip(answers, photos, strict=True):
        taken: set[int] = set()
        for place in places:
            eyes = np.hypot(*(place[1] - place[0]))
            off = [np.hypot(*(each - place).T).mean() / eyes for each in found]
            best = int(np.argmin(off)) if off else -1
            if off and off[best] < FOUND and best not in taken:
                taken.add(best)
                errors.append(off[best])
        total += len(places)
        wrong += len(found) - len(taken)
    return {
        "recall": len(errors) / total,
        "error": float(np.mean(errors)) if errors else float("nan"),
        "false": wrong / len(photos),
        "pace": len(photos) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with faces/ and portraits/")
    parser.add_argument("--photos", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    squares = [s for s in real_squares(options.data.parent) if s[0].size == (128, 128)]
    finders = {}
    for name, load in DETECTORS.items():
        try:
            finders[name] = load()
        except Exception as error:
            print(f"{name} is left out: {error}")  # noqa: T201
    lines, faces = [], 0
    for side, turn in CASES:
        photos = list(photographs(squares, side, turn, options.photos))
        faces = max(faces, sum(len(places) for _, places in photos))
        for name, find in finders.items():
            row = measured(find, photos)
            print(side, turn, name, json.dumps(row))  # noqa: T201
            lines.append(
                f"| {side} | {turn} | {name} | {row['recall']:.2f} | {row['error']:.3f} | "
                f"{row['false']:.2f} | {row['pace']:.1f} |".replace("nan", "-")
            )
    head = "| side, px | turn | detector | recall | error | false finds | photographs/CPU s |"
    machine = describe_machine()
    text = INTRODUCTION.format(
        photos=options.photos,
        faces=f"up to {faces}",
        machine=f"{machine['date']}, {machine['chip']}",
    )
    lines = [text, head, "|---|---|---|---|---|---|---|", *lines, CONCLUSION.rstrip()]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

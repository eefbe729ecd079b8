"""What a user points at, as a vector of an index: a picture or words.

Legend: E values of a vector.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32

from models.errors import AssetError, ConfigError, SampleError
from tasks.input.decode import decode
from tasks.input.sample import RawSample
from tasks.job import JobConfig
from tasks.run.run_json import read_declared, read_run
from tasks.run.vectors import default_index
from tasks.similar.index import Index
from tasks.storage.files import read_bytes
from tasks.work.device import to_images
from tasks.work.index import IndexJob
from tasks.work.invert import Inverter
from tasks.work.kinds import load_job
from tasks.work.spaces import OF_CODES, PictureSpace, of_codes

Vector = Float32[np.ndarray, "1 E"]


def of_picture(index: Index, path: str) -> Vector:
    """A picture, read and inverted as the run does with its own.

    Raises:
        ConfigError: it cannot be read, decoded, aligned or inverted.
    """
    job = load_job(index.source)
    assert isinstance(job, JobConfig)
    inverter = Inverter(replace(job, perceptual="none", identity=None), "cpu")
    _check_weights(index, "generator", inverter.hashes["generator"])
    key = path.rsplit("/", 1)[-1]
    raw = RawSample(key=key, uri=path, data=read_bytes(path, ConfigError))
    try:
        pixels = decode(raw, job.input, inverter.generator.resolution)[None]
    except SampleError as error:
        raise ConfigError(f"query picture {path}: {error}") from error
    seen = pixels
    if index.space in OF_CODES or "input" not in read_declared(index.source).pictures:
        found = inverter.invert(pixels, [key])
        if found.failures:
            raise ConfigError(f"query picture {path}: {found.failures[0][1]}")
        if index.space in OF_CODES:
            with torch.inference_mode():
                w_plus = found.inversion.w_plus
                return of_codes(index.space, w_plus, inverter.style_space).float().numpy()
        seen = found.pictures["inversion"]
    network = _network(index)
    return network(to_images(seen, torch.device("cpu"))).float().numpy()


def of_text(index: Index, text: str) -> Vector:
    """Words, for an index of CLIP's space.

    Raises:
        ConfigError: the index is of another space, or CLIP knows none of the words.
    """
    if index.space != "clip":
        raise ConfigError(
            f"--text needs an index of the space clip, {index.uri} is of {index.space}; make one: "
            f"refinery index {index.source} {default_index(index.source, 'clip')} --space clip"
        )
    return _network(index).network.texts([text]).numpy()


def _network(index: Index) -> PictureSpace:
    job = load_job(index.uri)
    assert isinstance(job, IndexJob)
    space = PictureSpace(index.space, getattr(job, index.space))
    _check_weights(index, index.space, space.network.hash)
    return space


def _check_weights(index: Index, name: str, found: str) -> None:
    made_with = read_run(index.uri)["weights"].get(name)
    if made_with != found:
        raise AssetError(
            f"{index.uri} was made with {name} {str(made_with)[:12]}, the one here is "
            f"{found[:12]}: their vectors cannot be compared; put the same weights here"
        )

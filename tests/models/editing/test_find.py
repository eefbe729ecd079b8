"""Finding a direction by name and by path, and what is said when there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints.load import load_generator
from models.editing.direction import Direction, save_direction
from models.editing.find import find_direction, known_directions
from models.errors import AssetError, ConfigError
from models.stylegan2.generator import Generator, weights_hash


def save(generator: Generator, folder: Path, name: str) -> Path:
    found = Direction(
        name=name,
        vector=torch.nn.functional.one_hot(torch.tensor(2), 16).float(),
        unit=1.0,
        generator_hash=weights_hash(generator),
    )
    return save_direction(found, folder / f"{name}.json")


def test_a_path_a_name_in_a_folder_and_a_raw_file(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    path = save(tiny_generator, tmp_path / "b", "hat")
    assert find_direction(str(path), tiny_generator).name == "hat"
    folders = (tmp_path / "a", tmp_path / "b")
    assert find_direction("hat", tiny_generator, folders).vector[2] == 1
    np.save(tmp_path / "smile.npy", 3 * np.eye(16, dtype=np.float32)[None, 5])
    raw = find_direction(str(tmp_path / "smile.npy"), tiny_generator)
    assert (raw.name, float(raw.vector[5]), raw.space) == ("smile", 1.0, "w")
    assert known_directions(tiny_generator, folders) == ["hat"]


def test_the_first_folder_wins_and_a_bundled_name_comes_last(tmp_path: Path) -> None:
    generator = load_generator("faces64")
    assert find_direction("age", generator, (tmp_path,)).card["terms"].startswith("non-commercial")
    own = Direction(
        name="age",
        vector=torch.eye(128)[0],
        unit=7.0,
        generator_hash=weights_hash(generator),
    )
    save_direction(own, tmp_path / "age.json")
    assert find_direction("age", generator, (tmp_path,)).unit == 7.0


def test_an_unknown_name_lists_what_is_known(tiny_generator: Generator, tmp_path: Path) -> None:
    for name in ("hat", "glasses"):
        save(tiny_generator, tmp_path, name)
    with pytest.raises(ConfigError, match=r"did you mean 'hat'\? known in .*: glasses, hat;"):
        find_direction("hut", tiny_generator, (tmp_path,))
    with pytest.raises(ConfigError, match=r"direction 'xyz' is unknown; known in no folder .*none"):
        find_direction("xyz", tiny_generator, ())
    for path in ("no/such/hat.json", "hat.npy"):
        with pytest.raises(ConfigError, match=rf"{path}: no such file; known in .*glasses, hat"):
            find_direction(path, tiny_generator, (tmp_path,))


def test_another_generators_direction_is_refused(tiny_generator: Generator, tmp_path: Path) -> None:
    path = save(load_generator("faces64"), tmp_path, "hat")
    for name in (str(path), "hat"):
        with pytest.raises(AssetError, match="direction hat: it was made for generator"):
            find_direction(name, tiny_generator, (tmp_path,))

"""The response of edits: what counts as monotone, and the whole measurement on a known scorer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.editing.direction import Direction, save_direction
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion
from models.stylegan2.generator import Generator, weights_hash
from models.stylegan2.residual import LowRank
from tasks.benchmark import edits
from tasks.benchmark.edits import (
    Response,
    edit_response,
    is_monotone,
    markdown,
    measure,
    run_response,
    summary,
    write_response,
)
from tasks.run.run_json import read_run
from tasks.work.invert import Inverter
from tests.tasks.small_run import begin, make_job, write_pictures


def test_what_counts_as_monotone() -> None:
    rising = torch.tensor([0.0, 1.0, 2.0, 10.0])
    cases = {
        "rising": (rising, True),
        "falling": (-rising, False),
        "flat": (torch.zeros(4), False),
        "a fall of 2 % of the range": (torch.tensor([0.0, 5.0, 4.81, 10.0]), True),
        "a fall of 3 % of the range": (torch.tensor([0.0, 5.0, 4.69, 10.0]), False),
        "down and up again": (torch.tensor([5.0, 0.0, 5.0, 6.0]), False),
        "saturated": (torch.tensor([0.0, 9.0, 10.0, 10.0]), True),
    }
    found = is_monotone(torch.stack([values for values, _ in cases.values()], 1))
    assert dict(zip(cases, found.tolist(), strict=True)) == {k: v for k, (_, v) in cases.items()}


class Colours:
    """Reads red and green off a picture."""

    names = ("red", "green")
    hash = "5c" * 32

    def to(self, device: object) -> "Colours":
        return self

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        mean = images.mean((2, 3))
        return {"red": mean[:, 0], "green": mean[:, 1]}


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def reddest(generator: Generator, name: str = "red") -> Direction:
    """A direction of style space that shifts the last ToRGB's styles towards red."""
    channels = tuple(layer.weight.shape[2] for _, layer, _ in generator.layers())
    vector = torch.zeros(sum(channels))
    vector[-channels[-1] :] = generator.layers()[-1][1].weight[0, 0, :, 0, 0].sign()
    return Direction(
        name=name,
        vector=vector / vector.norm(),
        unit=1.0,
        generator_hash=weights_hash(generator),
        channels=channels,
    )


def codes(generator: Generator, n: int = 5) -> Inversion:
    z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(0))
    o, i = generator.conv(2).conv.weight.shape[1:3]
    draw = torch.Generator().manual_seed(1)
    residual = LowRank(
        u=0.1 * torch.randn(n, o, 2, generator=draw), v=torch.randn(n, 2, i, 3, 3, generator=draw)
    )
    return Inversion(w_plus=generator.mapping(z), residual={2: residual})


def test_the_measurement_is_that_of_each_picture_alone(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against rendering one picture at one strength by hand; batches of two change nothing."""
    monkeypatch.setattr(edits, "BATCH", 2)
    found = codes(tiny_generator)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(2))
    direction = Direction(
        name="red",
        vector=vector / vector.norm(),
        unit=0.5,
        generator_hash=weights_hash(tiny_generator),
    )
    got = measure(found, tiny_generator, direction, Colours(), distance, (-1.0, 0.0, 2.0))
    for row in range(5):
        one = found[row : row + 1]
        plain = one.render(tiny_generator).clamp(-1, 1)
        for at, strength in enumerate((-1.0, 0.0, 2.0)):
            moved = one.w_plus + strength * 0.5 * direction.vector
            images = replace(one, w_plus=moved).render(tiny_generator).clamp(-1, 1)
            want = Colours().logits(images)
            for name in ("red", "green"):
                torch.testing.assert_close(got.attributes[name][at, row], want[name][0])
            torch.testing.assert_close(got.drift[at, row], distance(images, plain)[0])
    assert float(got.drift[1].max()) < 1e-10
    assert float(got.drift[2].min()) > 1e-6


def test_a_direction_in_style_space_reddens(tiny_generator: Generator) -> None:
    result = edit_response(
        codes(tiny_generator),
        tiny_generator,
        {"red": reddest(tiny_generator), "hat": reddest(tiny_generator, "hat")},
        Colours(),
        distance,
    )
    red, hat = result["rows"]["red"], result["rows"]["hat"]
    assert (red["monotone"], red["space"], red["attribute"]) == (1.0, "s", "red")
    assert red["mean"] == sorted(red["mean"])
    assert red["change"] == pytest.approx(red["mean"][-1] - red["mean"][0], abs=2e-4)
    assert red["change_in_deviations"]["red"] > red["change_in_deviations"]["green"]
    assert red["drift"][3] == 0.0
    assert (hat["attribute"], hat["monotone"]) == (None, None)
    assert hat["change_in_deviations"] == red["change_in_deviations"]
    assert result["scorer_hash"] == Colours.hash


def response() -> Response:
    up = torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    return Response(
        strengths=(-1.0, 0.0, 1.0),
        attributes={"age": up, "smile": torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]])},
        drift=torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.5, 0.7]]),
    )


def test_the_summary_in_numbers() -> None:
    """Of two pictures one rises; deviations are those between the unedited pictures."""
    found = summary("age", response())
    assert found["monotone"] == 0.5
    assert found["mean"] == [0.5, 2.0, 2.0]
    assert found["change"] == pytest.approx(1.5)
    assert found["change_in_deviations"]["age"] == pytest.approx(1.5 / 2**0.5, abs=1e-4)
    assert found["change_in_deviations"]["smile"] == pytest.approx(1.5 / 0.5**0.5, abs=1e-4)
    assert found["drift"] == [0.2, 0.0, 0.6]
    assert found["pictures"] == 2


def test_the_table(tmp_path: Path) -> None:
    row = {"space": "w", "unit": 1.0, "accuracy": 0.8125, **summary("age", response())}
    other = {"space": "s", "unit": 1.0, "accuracy": None, **summary("hat", response())}
    result = {
        "attributes": ["age", "smile"],
        "strengths": [-1.0, 0.0, 1.0],
        "rows": {"age": row, "hat": other},
    }
    lines = markdown(result).splitlines()
    assert (
        lines[2] == "| age | 0.81 | 50.0 % | 0.50, 2.00, 2.00 | **+1.06** | +2.12 | 0.200, 0.600 |"
    )
    assert lines[3] == "| hat |  |  |  | +1.06 | +2.12 | 0.200, 0.600 |"
    assert all(line.count("|") == 8 for line in lines)
    page, data = write_response(result, tmp_path / "new")
    assert page.read_text() == markdown(result)
    assert json.loads(data.read_text()) == result


def test_a_run_is_measured(
    tiny_generator: Generator,
    tmp_path: Path,
    face_bytes: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run's stored codes, a direction from a file, and the bundled trunk."""
    job = make_job(tiny_generator, tmp_path)
    pictures = write_pictures(tmp_path / "in", face_bytes[:2])
    run = begin(str(tmp_path / "out"), str(pictures), job, Inverter(job, "cpu")).finish()
    path = save_direction(reddest(tiny_generator), tmp_path / "red.json")
    monkeypatch.setattr(edits, "load_attributes", Colours)
    result = run_response(run.uri, tiny_generator, [str(path)])
    assert result["run_id"] == read_run(run.uri)["run_id"]
    assert result["pictures"] == 2
    row = result["rows"]["red"]
    assert row["monotone"] == 1.0
    assert row["drift"][0] > 0.001
    with pytest.raises(ConfigError, match="direction 'hat' is unknown"):
        run_response(run.uri, tiny_generator, ["hat"])


def test_another_generators_direction_is_refused_first(tiny_generator: Generator) -> None:
    foreign = replace(reddest(tiny_generator), generator_hash="00" * 32)
    with pytest.raises(AssetError, match="direction red: it was made for generator 000000000000"):
        edit_response(codes(tiny_generator), tiny_generator, {"red": foreign}, Colours(), distance)

"""Generator, chain and scores on one device: seeds, failures, memory, threads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from models.errors import AssetError, ConfigError, ShardError
from models.inversion import registry
from models.inversion.base import Inversion, Method, SampleRng
from models.stylegan2.generator import Generator, weights_hash
from models.stylegan2.residual import LowRank
from tasks.job import InputConfig, JobConfig, MethodConfig
from tasks.work.device import fixed_threads
from tasks.work.invert import Inverter
from tests.tasks.small_run import make_job

KEYS = ["a", "b", "c", "d"]


@dataclass(frozen=True, kw_only=True)
class ProbeMethodConfig:
    """Settings of the test's method."""

    breaks: str = ""


class ProbeMethod(Method):
    """Random codes around the average, with chosen faults; remembers what it was given."""

    Config = ProbeMethodConfig
    summary = "for tests"

    def __init__(self, generator: Generator, config: ProbeMethodConfig) -> None:
        super().__init__(generator, config)
        self.inits: list[Inversion | None] = []
        self.sizes: list[int] = []
        self.capacity = 99

    def hashes(self) -> dict[str, str]:
        return {"dice": "00ff"}

    def invert(self, images: torch.Tensor, init: Inversion | None, rng: SampleRng) -> Inversion:
        self.inits.append(init)
        self.sizes.append(len(images))
        if len(images) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        g = self.generator
        w_plus = g.latent_avg + 0.3 * rng.randn(g.num_ws, g.w_dim)
        noise, residual, failures = None, None, {}
        if self.config.breaks == "codes":
            w_plus[1, 2, 3] = torch.nan
        if self.config.breaks == "noise":
            noise = tuple(
                rng.randn(1, g.conv_resolution(i), g.conv_resolution(i)) for i in range(g.num_convs)
            )
            noise[2][1, 0, 0, 0] = torch.inf
        if self.config.breaks == "residual":
            o, i = g.conv(0).conv.weight.shape[1:3]
            low_rank = LowRank(u=rng.randn(o, 1), v=rng.randn(1, i, 3, 3))
            low_rank.u[1] = torch.nan
            residual = {0: low_rank}
        if self.config.breaks == "picture":
            w_plus[1] = 1e38
        if self.config.breaks == "says so":
            failures = {1: "step 3: lost"}
        return Inversion(w_plus=w_plus, noise=noise, residual=residual, failures=failures)


@pytest.fixture(autouse=True)
def _register(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.method_class
    monkeypatch.setattr(
        registry, "method_class", lambda name: ProbeMethod if name == "probe" else known(name)
    )


def build(generator: Generator, folder: Path, *breaks: str, **changes: object) -> Inverter:
    methods = tuple(
        MethodConfig(name="probe", settings={"breaks": text}) for text in breaks or ("",)
    )
    return Inverter(make_job(generator, folder, methods=methods, **changes), "cpu")


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def test_a_row_depends_on_its_picture_and_key_alone(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path)
    together = inverter.invert(pictures, KEYS)
    alone = inverter.invert(pictures[2:3], ["c"])
    torch.testing.assert_close(together.inversion.w_plus[2:3], alone.inversion.w_plus)
    assert together.metrics["mse"][2] == pytest.approx(alone.metrics["mse"][0], rel=1e-3)
    other = inverter.invert(pictures[2:3], ["x"])
    assert (other.inversion.w_plus - alone.inversion.w_plus).abs().max() > 0.1


def test_another_seed_gives_another_result(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    codes = [
        build(tiny_generator, tmp_path, seed=seed).invert(pictures, KEYS).inversion.w_plus
        for seed in (0, 0, 1)
    ]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_scores_are_of_the_rounded_picture(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path)
    found = inverter.invert(pictures, KEYS)
    assert found.pictures["inversion"].dtype == np.uint8
    difference = (found.pictures["inversion"].astype(float) - pictures) / 127.5
    mse = np.square(difference).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found.metrics["mse"], mse, rtol=1e-6)
    np.testing.assert_allclose(found.metrics["psnr"], 10 * np.log10(4 / mse), rtol=1e-6)
    assert inverter.layout.metrics == tuple(found.metrics) == ("mse", "psnr", "ssim", "nscd")
    assert set(found.seconds) == {"invert", "score"}
    same = inverter.invert(found.pictures["inversion"], KEYS)
    assert same.metrics["mse"].tolist() == [0.0] * 4
    assert np.isinf(same.metrics["psnr"]).all()


def test_nscd_is_of_the_final_codes(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path)
    found = inverter.invert(pictures, KEYS)
    w_plus = found.inversion.w_plus
    z = torch.randn(100_000, tiny_generator.z_dim, generator=torch.Generator().manual_seed(5))
    mapped = tiny_generator.mapping(z)[:, 0]
    cosines = []
    for name, layer, row in tiny_generator.layers():
        if name.startswith("to_rgb") and name != tiny_generator.layers()[-1][0]:
            continue
        anchor = torch.nn.functional.normalize(layer.modulation(mapped), dim=1).mean(0)
        style = layer.modulation(w_plus[:, row])
        cosines.append(torch.nn.functional.cosine_similarity(style, anchor[None]))
    # Other draws of z than the statistics': 100,000 of them leave a few 1e-4.
    expected = 1 - torch.stack(cosines).mean(0)
    np.testing.assert_allclose(found.metrics["nscd"], expected, atol=1e-3)
    assert found.metrics["nscd"].std() > 1e-3
    # Not a score of the picture: other targets, same codes.
    again = inverter.invert(255 - pictures, KEYS)
    assert again.metrics["nscd"].tolist() == found.metrics["nscd"].tolist()


def test_perceptual_column_has_its_honest_name(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path, perceptual="refinery")
    assert inverter.layout.metrics == ("mse", "psnr", "ssim", "trunk_distance", "nscd")
    found = inverter.invert(pictures, KEYS)
    assert (found.metrics["trunk_distance"] > 0).all()
    assert len(inverter.hashes["perceptual.trunk_distance"]) == 64


def test_hashes_name_everything_that_decides_the_result(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    template = tmp_path / "template.json"
    template.write_text("[[0.3, 0.3], [0.7, 0.3], [0.5, 0.5], [0.3, 0.7], [0.7, 0.7]]")
    inverter = build(
        tiny_generator, tmp_path, "", "", input=InputConfig(fit="align", template=str(template))
    )
    assert inverter.hashes.pop("generator") == weights_hash(tiny_generator)
    assert len(inverter.hashes.pop("input.template")) == 64
    assert inverter.hashes == {"methods.0.probe.dice": "00ff", "methods.1.probe.dice": "00ff"}


def test_methods_chain(tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray) -> None:
    inverter = build(tiny_generator, tmp_path, "", "")
    inverter.invert(pictures, KEYS)
    first, second = inverter.methods
    assert first.inits == [None]
    assert second.inits[0].w_plus.shape == (4, tiny_generator.num_ws, tiny_generator.w_dim)


@pytest.mark.parametrize(
    ("breaks", "kind"),
    [
        ("codes", "not_finite"),
        ("noise", "not_finite"),
        ("residual", "not_finite"),
        ("picture", "not_finite"),
        ("says so", "diverged"),
    ],
)
def test_one_broken_row_leaves_its_neighbours_alone(
    breaks: str, kind: str, tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path, breaks)
    found = inverter.invert(pictures, KEYS)
    assert {row: why[0] for row, why in found.failures.items()} == {1: kind}
    for values in found.metrics.values():
        assert np.isfinite(values[[0, 2, 3]]).all()
    if breaks == "codes":
        assert found.failures[1][1] == "the codes are not finite"
        torch.testing.assert_close(
            found.inversion.w_plus[1], tiny_generator.latent_avg.expand(tiny_generator.num_ws, -1)
        )
        clean = build(tiny_generator, tmp_path).invert(pictures, KEYS)
        assert np.array_equal(
            found.pictures["inversion"][[0, 2, 3]], clean.pictures["inversion"][[0, 2, 3]]
        )


def test_the_next_method_gets_numbers(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path, "codes", "")
    found = inverter.invert(pictures, KEYS)
    assert inverter.methods[1].inits[0].w_plus.isfinite().all()
    assert list(found.failures) == [1]  # finite again later, and still not what was asked for


def test_out_of_memory_halves_the_batch(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path, batch=4)
    whole = inverter.invert(pictures, KEYS)
    method = inverter.methods[0]
    method.capacity, method.sizes = 1, []
    found = inverter.invert(pictures, KEYS)
    assert method.sizes == [4, 2, 1, 1, 1, 1]
    assert found.notes == ("out of memory: batch lowered from 4 to 1",)
    torch.testing.assert_close(found.inversion.w_plus, whole.inversion.w_plus)
    assert np.abs(found.pictures["inversion"].astype(int) - whole.pictures["inversion"]).max() <= 1
    np.testing.assert_allclose(found.metrics["mse"], whole.metrics["mse"], rtol=1e-2)
    method.sizes = []
    inverter.invert(pictures, KEYS)
    assert method.sizes == [1, 1, 1, 1]  # it is not tried again


def test_failures_keep_their_rows_when_the_batch_is_halved(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path, "says so")
    inverter.methods[0].capacity = 2
    assert sorted(inverter.invert(pictures, KEYS).failures) == [1, 3]


def test_out_of_memory_with_one_picture(
    tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    inverter = build(tiny_generator, tmp_path)
    inverter.methods[0].capacity = 0
    with pytest.raises(ShardError, match=r"single 32 px picture .*Tried to allocate 2 GiB\); use"):
        inverter.invert(pictures, KEYS)


def test_other_errors_pass(tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray) -> None:
    inverter = build(tiny_generator, tmp_path)

    def fail(*_: object) -> Inversion:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    inverter.methods[0].invert = fail
    with pytest.raises(RuntimeError, match="illegal memory access"):
        inverter.invert(pictures, KEYS)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_close(
    precision: str, tiny_generator: Generator, tmp_path: Path, pictures: np.ndarray
) -> None:
    full = build(tiny_generator, tmp_path).invert(pictures, KEYS)
    inverter = build(tiny_generator, tmp_path, precision=precision)
    half = inverter.invert(pictures, KEYS)
    assert inverter.generator.compute_dtype == getattr(torch, precision)
    assert half.inversion.w_plus.dtype == torch.float32
    assert not half.failures
    assert 0 < np.abs(full.pictures["inversion"].astype(int) - half.pictures["inversion"]).max() < 8


def test_threads_are_fixed_and_put_back() -> None:
    before = torch.get_num_threads()
    with fixed_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "expected cpu, cuda or cuda:<number>"), ("cuda", "sees no CUDA device")],
)
def test_wrong_device(device: str, message: str, tiny_generator: Generator, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=message):
        Inverter(make_job(tiny_generator, tmp_path), device)


def test_no_method(tiny_generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no method"):
        Inverter(make_job(tiny_generator, tmp_path, methods=()), "cpu")


def test_a_missing_generator_is_named(tmp_path: Path, tiny_generator: Generator) -> None:
    job = make_job(tiny_generator, tmp_path)
    with pytest.raises(AssetError, match="nowhere"):
        Inverter(JobConfig(generator=str(tmp_path / "nowhere.pt"), methods=job.methods), "cpu")


def test_weights_may_lie_in_object_storage(
    tiny_generator: Generator,
    tmp_path: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tasks.storage.files import write_bytes

    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path / "cache"))
    job = make_job(tiny_generator, tmp_path)
    for suffix in (".safetensors", ".json"):
        data = Path(job.generator).with_suffix(suffix).read_bytes()
        write_bytes(f"{s3}/weights/tiny{suffix}", data)
    remote = JobConfig(
        generator=f"{s3}/weights/tiny.safetensors", methods=job.methods, perceptual="none"
    )
    assert Inverter(remote, "cpu").hashes["generator"] == weights_hash(tiny_generator)

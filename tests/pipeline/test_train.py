"""Training from TOML: the plain fit, and two processes under Ray Train."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.errors import ConfigError
from pipeline.cli import run_app
from pipeline.config import load_dataclass
from pipeline.train import FITS, train
from tests.conftest import make_picture


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Sixteen pictures and a generator of milliseconds."""
    pictures = []
    for seed in range(16):
        buffer = io.BytesIO()
        make_picture(seed, 16).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    pq.write_table(pa.table({"image": pictures}), tmp_path / "data.parquet")
    path = tmp_path / "fit.toml"
    path.write_text(
        f'data = ["{tmp_path}/data.parquet"]\nout = "{tmp_path}/out"\nresolution = 16\n'
        "images = 16\nbatch = 4\nz_dim = 8\nw_dim = 8\nmapping_layers = 2\n"
        'precision = "float32"\nthreads = 1\nlog_images = 8\ncheckpoint_images = 16\n'
        "frechet_images = 0\n"
        "[widths]\n4 = 8\n8 = 8\n16 = 8\n"
    )
    return path


def images_shown(out: Path) -> int:
    return torch.load(out / "checkpoint.pt", weights_only=True)["images"]


def test_one_process(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["train", "generator", "--config", str(config), "--set", "images=8"]) == 0
    assert "checkpoint.pt" in capsys.readouterr().out
    assert images_shown(config.parent / "out") == 8


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_two_processes_under_ray_train(config: Path) -> None:
    out = train("generator", str(config), [], workers=2)
    assert out == config.parent / "out"
    assert images_shown(config.parent / "out") == 16


def test_wrong_requests(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["train", "encoder"]) == 2
    assert (
        "train encoder: unknown; did you mean 'w-encoder'? (of all, attr" in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="train trunk runs on one process"):
        train("trunk", None, [], workers=2)
    assert run_app(["train", "generator", "--config", str(config), "--set", "batchh=1"]) == 2
    assert "batchh: unknown key; did you mean 'batch'?" in capsys.readouterr().err


@pytest.mark.parametrize("what", sorted(FITS))
def test_every_fit_has_a_config_of_that_name(what: str) -> None:
    import importlib

    module, name = FITS[what]
    found = importlib.import_module(module)
    with pytest.raises(ConfigError, match=r"no_such_key: unknown key; "):
        load_dataclass(getattr(found, name), None, ["no_such_key=1"])
    assert callable(found.fit)

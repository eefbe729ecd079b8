"""What a worker makes of errors, and which weights it accepts."""

import errno

import pytest
import torch

from models.errors import AssetError, ConfigError, LedgerError, ShardError
from pipeline.faults import is_cuda_error, is_passing
from pipeline.schedule import Failure
from pipeline.worker import CUDA_EXIT_CODE, ShardWorker, WorkOrder, failed_result
from tasks.input.sample import CorruptFileError
from tasks.job import JobConfig, MethodConfig
from tasks.run.run_json import RunHandle


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "failure", "is_fatal"),
    [
        (ShardError("a part is unreadable"), Failure.SHARD, False),
        (CorruptFileError("a.tar is corrupt"), Failure.DAMAGED, False),
        (caused(ShardError("no answer"), ConnectionError()), Failure.STORAGE, False),
        (LedgerError("marker"), Failure.STORAGE, False),
        (caused(LedgerError("no rights"), PermissionError(13, "")), Failure.STORAGE, True),
        (caused(ShardError("cannot write"), FULL), Failure.SHARD, True),
        (AssetError("no checkpoint"), Failure.SHARD, True),
        (ConfigError("bad"), Failure.SHARD, True),
        (ZeroDivisionError("division"), Failure.SHARD, False),
    ],
)
def test_what_an_error_means(error: Exception, failure: Failure, is_fatal: bool) -> None:
    result = failed_result(3, error)
    assert (result.shard, result.failure, result.is_fatal) == (3, failure, is_fatal)
    assert str(error) in (result.error or "")


def test_errors_that_nobody_named_carry_their_type() -> None:
    assert failed_result(0, KeyError("x")).error == "KeyError: 'x'"


def test_cuda_errors_but_not_out_of_memory() -> None:
    assert is_cuda_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_cuda_error(caused(ShardError("x"), torch.AcceleratorError("device-side assert")))
    assert not is_cuda_error(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_cuda_error(ValueError("x"))


def test_passing_faults_are_seen_below_other_errors() -> None:
    assert is_passing(caused(LedgerError("x"), caused(ValueError(), TimeoutError())))
    assert not is_passing(caused(LedgerError("x"), ValueError()))


def make_worker(monkeypatch: pytest.MonkeyPatch, hashes: dict[str, str]) -> ShardWorker:
    class Loaded:
        def __init__(self) -> None:
            self.hashes = hashes

    monkeypatch.setattr("pipeline.worker.load_station", lambda *_: Loaded())
    job = JobConfig(generator="none", methods=(MethodConfig(name="e4e"),))
    run = RunHandle(uri="/no/such/run", run_id="r")
    return ShardWorker(
        WorkOrder(job=job, run=run, hashes={"generator": "a" * 64}, device="cpu", threads=1)
    )


def test_other_weights_than_the_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make_worker(monkeypatch, {"generator": "a" * 64}).start()
    worker = make_worker(monkeypatch, {"generator": "b" * 64, "e4e": "c" * 64})
    with pytest.raises(AssetError, match=r"e4e: run none, here cccccccccccc; generator: run aaaa"):
        worker.start()
    assert worker.run(0).is_fatal


def test_a_broken_cuda_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)

    def fail(*args: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    worker = make_worker(monkeypatch, {"generator": "a" * 64})
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("tasks.run.manifest.read_shard_spec", fail)
    worker.run(0)
    assert codes == [CUDA_EXIT_CODE]

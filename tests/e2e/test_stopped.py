"""SIGTERM in any stage is "stopped", exit 130, and never told as damaged data."""

import subprocess
import sys

from tests.e2e.small_dataset import Dataset, run_inline

PROGRAM = """
import os, signal, sys
from pipeline import cli
from tasks.storage.part_files import PartFile

read = PartFile.read

def preempted(self, size=-1):
    os.kill(os.getpid(), signal.SIGTERM)
    return read(self, size)

PartFile.read = preempted
sys.argv = ["refinery", *sys.argv[1:]]
cli.main()
"""


def test_sigterm_while_parts_are_read(dataset: Dataset, s3: str) -> None:
    """The signal comes inside a read that DuckDB has asked for, which makes an error of it."""
    run = f"{s3}/run"
    run_inline(dataset, run)
    for name, *more in (["report"], ["query", "SELECT count(w_plus) FROM latents"]):
        tokens = [sys.executable, "-c", PROGRAM, name, run, *more]
        done = subprocess.run(tokens, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr.split(";")[0] == "stopped"


LEAVING = """
import os, signal, sys, threading, time
from pipeline import cli

leave, is_done = cli.leave, threading.Event()

def done(code):
    is_done.set()
    leave(code)

def late():
    is_done.wait()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)

cli.leave = done
threading.Thread(target=late).start()
sys.argv = ["refinery", "settings"]
cli.main()
"""


def test_sigterm_after_the_last_word_changes_nothing() -> None:
    """A command that has done its work is not told as stopped, and shows no traceback."""
    tokens = [sys.executable, "-c", LEAVING]
    done = subprocess.run(tokens, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "shard_size" in done.stdout

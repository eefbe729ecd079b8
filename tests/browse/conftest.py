"""Runs with hostile names, served by `refinery browse` as a program of its own."""

import http.client
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from pipeline.config import load_config
from pipeline.edit import Wishes, load_edit_config
from pipeline.run import carry_out
from tests.conftest import ROOT, make_tiny_generator
from tests.e2e.small_dataset import write_dataset
from tests.tasks.small_edit import write_direction, write_domain

EVIL = "<img src=x onerror=alert(1)>\"'&.png"
RTL = "תמונה של חתול.png"
EMOJI = "\U0001f469\u200d\U0001f680 astronaut.png"
LONG = "a-long-name-" * 18 + "end.png"
CLIMBING = "x%2f..%2f..%2fetc%2fpasswd.png"
NAMES = (EVIL, RTL, EMOJI, LONG, CLIMBING)
RUN, EDITED = "runs/photos", "runs/edited"


@dataclass(frozen=True)
class Server:
    """A running `refinery browse`.

    Attributes:
        root: the folder that it was given.
        log: what it printed to stderr.
    """

    root: Path
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        **parameters: object,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        address = f"{path}?{urlencode(parameters, doseq=True)}" if parameters else path
        own = {"Origin": self.address} if method == "POST" else {}
        try:
            connection.request(method, address, body, {**own, **(headers or {})})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def post(self, path: str, **form: object) -> tuple[int, dict[str, str], bytes]:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.ask(path, method="POST", body=urlencode(form).encode(), headers=kind)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory, face_bytes: list[bytes]) -> Path:
    """A run of inversions whose samples have hostile names, one of them broken; a run of its
    edits; a direction and a domain; beside them a secret, and a link that leads out."""
    folder = tmp_path_factory.mktemp("browsed")
    generator = make_tiny_generator()
    dataset = write_dataset(folder / "data", generator, face_bytes)
    for index, name in enumerate(NAMES):
        Path(dataset.source, name).write_bytes(face_bytes[index])
    config = load_config(dataset.config, ["engine.kind=inline"])
    runs = folder / "root/runs"
    assert carry_out(dataset.source, str(runs / "photos"), config).outcome.failed == 1
    (runs / "directions").mkdir()
    write_direction(generator, runs / "directions/turn.json")
    write_domain(generator, runs / "domains/oil")
    wishes = Wishes(edits=[f"{runs}/directions/turn.json=+1"], is_each=True)
    plain = ["perceptual=none", "attributes=none", "engine.kind=inline"]
    edit = load_edit_config(str(runs / "photos"), None, plain, wishes)
    assert carry_out(str(runs / "photos"), str(runs / "edited"), edit).is_clean
    outside = folder / "outside"
    shutil.copytree(runs / "photos", outside / "secret")
    (folder / "root/link").symlink_to(outside)
    (folder / "secret.txt").write_text("not for you")
    return folder / "root"


@pytest.fixture(scope="session")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The program, on a free port."""
    log = tmp_path_factory.mktemp("server") / "stderr"
    command = [sys.executable, "-m", "pipeline.cli", "browse", str(root), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "2 runs at http://127.0.0.1:" in line, log.read_text()
        yield Server(root, int(line.rsplit(":", 1)[1].strip("/ \n")), log)
        process.terminate()
        assert process.wait(60) == 0, log.read_text()

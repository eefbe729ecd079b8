"""The commands of docs/operations.md: those of `refinery` are run here in their order, on a small
bucket; of each other one stands here which test runs it, or why none does."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import run_app
from tasks.storage.files import exists, remove, write_bytes
from tests.conftest import make_tiny_generator
from tests.deploy.test_operations_doc import BLOCKS, ROOT, TEXT
from tests.e2e.small_dataset import rows, write_dataset

INSTALL = (
    "downloads some GB from a package registry; tests/deploy/test_constraints.py holds its pins"
)
KUBERNETES = "needs a Kubernetes cluster; tests/deploy/test_kuberay.py reads its files"
DEPLOYMENTS = "tests/deploy/test_prefect_deployment.py::test_every_shipped_deployment_runs"
NIGHTS = "tests/services/test_nights.py::test_everything_dies_while_a_night_runs"
CLUSTER = "tests/e2e/test_ray_dies.py::test_nodes_of_a_cluster_join_and_die"
ELSEWHERE = {
    "make demo": "takes minutes; its road in small: tests/pipeline/test_demo.py::"
    "test_the_demo_ends_with_the_table_and_the_report_and_can_be_asked",
    "python3.11 -m venv": INSTALL,
    ".venv/bin/pip install": INSTALL,
    "ray start": f"needs other machines; nodes on this one: {CLUSTER}",
    "refinery invert s3://pictures/faces s3://refinery/runs/faces --config deploy/nightly.toml "
    "--set engine.address=auto": CLUSTER,
    "kubectl": KUBERNETES,
    "export PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=": NIGHTS,
    "prefect server start": NIGHTS,
    "export PREFECT_API_URL=": DEPLOYMENTS,
    "prefect work-pool create": DEPLOYMENTS,
    "prefect gcl create": DEPLOYMENTS,
    "prefect automation create": DEPLOYMENTS,
    "prefect --no-prompt deploy": DEPLOYMENTS,
    "prefect worker start": DEPLOYMENTS,
    "prefect deployment run": DEPLOYMENTS,
}
"""Beginnings of commands that are not run here."""
FACES = "s3://refinery/runs/faces"
HERE = {
    "refinery plan s3://pictures/faces --method e4e": "images 12 bytes",
    f"refinery invert s3://pictures/faces {FACES} --method e4e": "12 in 3 shards, 1 failed",
    f"refinery status {FACES}": "3 of 3 committed, 0 pending rows 12 of 12 failed rows 1",
    f"refinery verify {FACES}": "clean",
    f'refinery query {FACES} "SELECT error_kind, count(*) FROM latents GROUP BY ALL"': "decode │ 1",
    f"refinery report {FACES}": "report.html",
    f"refinery retry {FACES}": "1 failed this time 0 rows",
    f"refinery retry {FACES} --failed": "1 failed this time 4 rows",
    f"refinery retry {FACES} --where \"error_kind = 'read'\"": "0 failed this time 4 rows",
    f"refinery invert s3://pictures/faces {FACES}-2 --method e4e --update {FACES}": "1 in 1 shards",
    f"refinery plan s3://pictures/faces {FACES} --config deploy/nightly.toml"
    " --price-per-hour 2.5": "images 13 bytes",
    f"refinery gc {FACES}": "0 files removed",
    f'refinery query {FACES} "SELECT * FROM shards"': "committed",
    f"refinery compact {FACES}": "6 files before, 2 now",
}
"""What each says. Those that stand within sentences come last."""


def test_of_every_command_it_is_known_who_runs_it() -> None:
    lines = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
    others = [line for line in lines if line and line not in HERE]
    assert not [line for line in others if not line.startswith(tuple(ELSEWHERE))]
    assert not [begin for begin in ELSEWHERE if not any(x.startswith(begin) for x in others)]
    in_sentences = re.findall(r"`(refinery \w+ RUN[^`]*)`", TEXT)
    named = {*lines, *(command.replace("RUN", FACES) for command in in_sentences)}
    assert named >= HERE.keys()
    assert named - HERE.keys() <= {"", *others}
    for place in ELSEWHERE.values():
        (file, name) = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", place)[0]
        assert f"def {name}" in (ROOT / file).read_text()


@pytest.mark.timeout(300)
def test_runs_on_one_machine(
    s3: str, tmp_path: Path, face_bytes: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset", make_tiny_generator(), face_bytes)
    pictures = f"{s3}/pictures/faces"
    for path in sorted(Path(dataset.source).iterdir()):
        write_bytes(f"{pictures}/{path.name}", path.read_bytes())
    # The bundled encoder takes minutes here: the small generator instead.
    not_ours = ("--method", "e4e", "--config", "deploy/nightly.toml")
    inline = ["--set", "engine.kind=inline"]
    small = ["--config", dataset.config, *inline, "--set", "engine.shard_size=4"]
    ours = {
        "plan": [*small, "--probe", "2"],
        "invert": [*small, "--no-flow"],
        "retry": inline,
    }
    # What has happened to the bucket when a command is given.
    meanwhile = {
        "--failed": lambda: remove([f"{pictures}/zz-broken.png"]),
        "--where": lambda: write_bytes(f"{pictures}/zz-broken.png", face_bytes[0]),
        "--update": lambda: write_bytes(f"{pictures}/new.png", face_bytes[1]),
    }
    for line, said in HERE.items():
        words = [word.replace("s3://", f"{s3}/") for word in shlex.split(line)[1:]]
        for option in meanwhile.keys() & words:
            meanwhile[option]()
        words = [word for word in words if word not in not_ours] + ours.get(words[0], [])
        assert run_app(words) == 0, line
        assert said in " ".join(capsys.readouterr().out.split()), line
    assert exists(f"{s3}/refinery/runs/faces/report.html")
    assert rows(f"{s3}/refinery/runs/faces-2")["sample_key"].to_pylist() == ["new.png"]

"""`make test-s3`: what the runs ask of an S3 server, asked of moto's and of Ceph's gateway."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.storage.files import exists, file_info, join, list_files, read_bytes, remove, write_bytes
from tasks.storage.once import create_bytes, creates_once
from tests.chaos.__main__ import run_trial
from tests.chaos.faults import QUICK
from tests.chaos.invariants import check_exit
from tests.chaos.site import KINDS, Site, run_driver
from tests.services.ceph import ceph_gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FAULTS = [name for name in QUICK if name.startswith("s3-")]


@pytest.fixture(scope="module")
def moto_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    before = dict(os.environ)
    found = Site.make(tmp_path_factory.mktemp("chaos"))
    yield found
    found.close()
    os.environ.clear()
    os.environ.update(before)


SERVERS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("moto", "ceph")]


@pytest.fixture(scope="module", params=SERVERS)
def site(request: pytest.FixtureRequest, moto_site: Site) -> Iterator[Site]:
    if request.param == "moto":
        yield moto_site
        return
    with ceph_gateway() as gateway:
        found = moto_site.at(gateway)
        yield found
        found.proxy.close()


@pytest.fixture
def bucket(site: Site, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in site.server.environment.items():
        monkeypatch.setenv(name, value)
    return site.server.make_bucket()


def test_files(bucket: str) -> None:
    place = join(bucket, "a folder", "ü%20?.bin")
    data = bytes(range(256)) * 40_000  # larger than one block
    write_bytes(place, data)
    assert read_bytes(place) == data
    assert file_info(place) is not None
    names = [f"{number:04d}" for number in range(1_050)]  # more than a page of a listing
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_bytes(join(bucket, "many", name), b"x"), names))
    assert [name for name, _, _ in list_files(join(bucket, "many"))] == names
    remove([place])
    assert not exists(place)


def test_of_many_that_create_one_object_one_wins(bucket: str) -> None:
    won: list[int] = []
    ready = threading.Barrier(8)

    def create(number: int) -> None:
        ready.wait()
        if create_bytes(join(bucket, "commits", "00000.json"), str(number).encode()):
            won.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8)))
    found = int(read_bytes(join(bucket, "commits", "00000.json")))
    if creates_once(join(bucket, "commits", "any")):
        assert won == [found]
    else:  # what is then promised: the protocol reads back what won
        assert found in won


@pytest.mark.parametrize("fault", FAULTS)
def test_a_trial(fault: str, site: Site, bucket: str) -> None:
    kind = KINDS[FAULTS.index(fault) % len(KINDS)]
    assert run_trial(site, fault, 11, kind).problems == []


def test_a_run_on_the_server_alone(site: Site, bucket: str, tmp_path: Path) -> None:
    """Without a proxy, pictures from the store as well."""
    source = join(bucket, "pictures")
    for path in sorted(Path(site.dataset.source).iterdir()):
        write_bytes(join(source, path.name), path.read_bytes())
    words = site.words("invert", join(bucket, "run"))
    words[1] = source
    process = site.context.Process(
        target=run_driver, args=(words, dict(site.server.environment), str(tmp_path / "log"))
    )
    process.start()
    process.join(300)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 0, said
    assert check_exit(0, said) == []
    assert "12 in 6 shards, 1 failed" in " ".join(said.split())

"""Ceph's S3 gateway on loopback for tests: one monitor, one storage daemon in memory, one gateway.

Needs Debian's packages ceph-mon, ceph-osd, ceph-common and radosgw (16.2 was used). Everything lies
in one folder and is gone with it.
"""

import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import wait_for
from tests.s3_server import S3Server
from tests.services.prefect_site import free_port

PROGRAMS = (
    "ceph-mon",
    "ceph-osd",
    "radosgw",
    "radosgw-admin",
    "ceph-authtool",
    "monmaptool",
    "ceph",
)
CONF = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon}]
mon_initial_members = a
public_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/keyring
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file = {folder}/$name.pid
crash_dir = {folder}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = {memory}
osd_data = {folder}/osd
mon_data = {folder}/mon
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_pg_warn_min_per_osd = 0
auth_allow_insecure_global_id_reclaim = true
erasure_code_dir = {library}/ceph/erasure-code
osd_class_dir = {library}/rados-classes
plugin_dir = {library}/ceph
ms_bind_ipv6 = false
rgw_frontends = beast endpoint=127.0.0.1:{rgw}
"""


class CephGateway(S3Server):
    """The gateway, answering. Same attributes as moto's server."""

    def __init__(self, memory_bytes: int = 2**30) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="refinery-ceph-"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        mon, port, fsid = free_port(), free_port(), str(uuid.uuid4())
        self.endpoint = f"http://127.0.0.1:{port}"
        self._key, self._secret = "testing", secrets.token_hex(16)
        # Beside the programs, which may be unpacked anywhere.
        library = next(Path(shutil.which("ceph-osd") or "").parents[1].glob("lib/*/ceph")).parent
        text = CONF.format(
            folder=self.folder,
            mon=mon,
            rgw=port,
            fsid=fsid,
            library=library,
            memory=memory_bytes,
        )
        (self.folder / "ceph.conf").write_text(text)
        try:
            self._start(mon, fsid)
        except BaseException:
            self.stop()
            raise

    def _start(self, mon: int, fsid: str) -> None:
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        everything = [
            "--cap",
            "mon",
            "allow *",
            "--cap",
            "osd",
            "allow *",
            "--cap",
            "mgr",
            "allow *",
        ]
        for name in ("mon.", "client.admin", "client.rgw"):
            create = [] if Path(keyring).exists() else ["--create-keyring"]
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *everything)
        address = f"[v2:127.0.0.1:{mon}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        mkfs = ["--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring]
        self._run("ceph-mon", *mkfs)
        self._daemon("ceph-mon", "-f", "-i", "a")
        osd, secret = str(uuid.uuid4()), self._run("ceph-authtool", "--gen-print-key").strip()
        new = ["osd", "new", osd, "-i", "-", "--connect-timeout", "60"]
        number = self._run("ceph", *new, data=f'{{"cephx_secret": "{secret}"}}').strip()
        (self.folder / "osd").mkdir()
        add = ["-n", f"osd.{number}", "--add-key", secret]
        self._run(
            "ceph-authtool", keyring, *add, "--cap", "mon", "allow *", "--cap", "osd", "allow *"
        )
        self._run("ceph-osd", "--mkfs", "-i", number, "--osd-uuid", osd)
        self._daemon("ceph-osd", "-f", "-i", number)
        self._daemon("radosgw", "-f", "-n", "client.rgw")
        wait_for(self._answers, 180, "Ceph's gateway")
        user = ["--uid=tests", "--display-name=tests", f"--access-key={self._key}"]
        self._run("radosgw-admin", "user", "create", *user, f"--secret-key={self._secret}")

    def _command(self, program: str, *words: str) -> list[str]:
        return [program, *words, "-c", str(self.folder / "ceph.conf")]

    def _run(self, program: str, *words: str, data: str | None = None) -> str:
        done = subprocess.run(
            self._command(program, *words), input=data, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, f"{program} {words}: {done.stderr[-2000:]}"
        return done.stdout

    def _daemon(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("wb") as log:
            process = subprocess.Popen(self._command(*words), stdout=log, stderr=log)
        self._daemons.append(process)

    def _answers(self) -> bool:
        for process in self._daemons:
            assert process.poll() is None, f"{process.args} has ended; see {self.folder}"
        try:
            with urllib.request.urlopen(self.endpoint, timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    @property
    def environment(self) -> dict[str, str]:
        own = {"AWS_ACCESS_KEY_ID": self._key, "AWS_SECRET_ACCESS_KEY": self._secret}
        own |= {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
        return super().environment | own | {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}

    def make_bucket(self) -> str:
        import boto3

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self._key,
            aws_secret_access_key=self._secret,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)
        client.close()
        return f"s3://{name}"

    def stop(self) -> None:
        for process in reversed(self._daemons):
            process.kill()
            process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def ceph_gateway() -> Iterator[CephGateway]:
    """A gateway for the length of a block, or a skipped test where there is none."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"Ceph is not installed: no {', '.join(missing)} on PATH")
    before = dict(os.environ)
    gateway = CephGateway()
    try:
        yield gateway
    finally:
        gateway.stop()
        os.environ.clear()
        os.environ.update(before)

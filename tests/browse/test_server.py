"""`refinery browse` over HTTP: what it answers, what it refuses, and that it changes nothing."""

import hashlib
import html
import io
import json
import os
import re
import shutil
import socket
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.browse import UPLOAD_BYTES
from pipeline.cli import run_app
from tasks.browse.library import Library
from tasks.browse.neighbours import nearest
from tasks.run.query import query
from tests.browse.conftest import CLIMBING, EDITED, EMOJI, EVIL, LONG, NAMES, RTL, RUN, Server

PAGES = ("/grid", "/picture", "/neighbours", "/statistics", "/sql", "/photo")


def keys_of(server: Server, run: str = RUN) -> list[str]:
    found = query(str(server.root / run), "SELECT sample_key FROM latents ORDER BY 1")
    return found["sample_key"].to_pylist()


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "thumbnails" not in path.parts
    }


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)


def stored(server: Server, key: str, column: str, run: str = RUN) -> bytes:
    text = "'" + key.replace("'", "''") + "'"
    sql = f"SELECT * FROM images WHERE sample_key = {text}"
    return query(str(server.root / run), sql).to_pylist()[0][column]["bytes"]


# ------------------------------------------------------------------ what it answers


def test_runs_of_the_root_are_listed_and_no_other(server: Server) -> None:
    status, _, body = server.ask("/")

    assert status == 200
    assert re.findall(rb"/grid\?run=([\w%]+)\"", body) == [b"runs%2Fedited", b"runs%2Fphotos"]
    assert b"secret" not in body  # behind a symbolic link


def test_pages_show_hostile_names_as_text(server: Server) -> None:
    for run in (RUN, EDITED):
        _, _, body = server.ask("/grid", run=run)
        text = body.decode()
        assert "<img src=x" not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        for key in NAMES:
            status, _, page = server.ask("/picture", run=run, key=key)
            assert status == 200
            assert "<img src=x" not in page.decode()


def test_grid_filters_sorts_and_pages(server: Server) -> None:
    rows = query(str(server.root / RUN), "SELECT * FROM latents WHERE status = 'ok'").to_pylist()
    middle = sorted(row["psnr"] for row in rows)[len(rows) // 2]

    def shown(**asked: object) -> list[str]:
        _, _, body = server.ask("/grid", run=RUN, **asked)
        return [html.unescape(k) for k in re.findall(r'data-key="([^"]*)"', body.decode())]

    assert len(shown()) == len(rows) + 1
    assert shown(status="failed") == ["zz-broken.png"]
    assert shown(q="ASTRONAUT") == [EMOJI]
    best = [r["sample_key"] for r in sorted(rows, key=lambda r: (-r["psnr"], r["sample_key"]))]
    assert shown(status="ok", sort="psnr", order="desc") == best
    above = {r["sample_key"] for r in rows if r["psnr"] >= middle}
    assert set(shown(**{"min.psnr": middle})) == above
    assert shown(where="sample_key LIKE 'face%' AND seed IS NULL") == []


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("true); DROP TABLE rows; SELECT (true", "not one condition"),
        ("sample_key IN (SELECT content FROM read_text('/etc/passwd'))", "disabled"),
        ("psnr <", "syntax error"),
        ("no_such_column > 1", "no_such_column"),
        ("(SELECT count(*) FROM range(1000000000000) t(a), range(100000) u(b)) > 0", "too long"),
    ],
)
def test_a_condition_cannot_do_more_than_choose_rows(server: Server, where: str, said: str) -> None:
    status, _, body = server.ask("/grid", run=RUN, where=where)

    assert status == 200
    assert said in body.decode()
    assert b"data-key" not in body
    assert server.ask("/grid", run=RUN)[2].count(b"data-key") == len(keys_of(server))


def test_pictures_are_the_stored_ones(server: Server) -> None:
    for key in NAMES:
        status, headers, body = server.ask("/stored", run=RUN, key=key, column="inversion")
        assert (status, headers["content-type"]) == (200, "image/png")
        assert body == stored(server, key, "inversion")


def test_sliders_render_what_an_edit_run_stores(server: Server) -> None:
    plain = server.ask("/render", run=RUN, key=EVIL)[2]
    turned = server.ask("/render", run=RUN, key=EVIL, **{"direction.turn": 1})[2]
    oily = server.ask("/render", run=RUN, key=EVIL, **{"domain.oil": 0.7})[2]

    (variant,) = [c for c in query_columns(server, EDITED) if c.startswith("turn")]
    np.testing.assert_allclose(pixels(plain), pixels(stored(server, EVIL, "inversion")), atol=1)
    expected = pixels(stored(server, EVIL, variant, EDITED))
    np.testing.assert_allclose(pixels(turned), expected, atol=1)
    assert np.abs(pixels(turned) - pixels(plain)).max() > 4
    assert np.abs(pixels(oily) - pixels(plain)).max() > 4


def query_columns(server: Server, run: str) -> list[str]:
    return query(str(server.root / run), "SELECT * FROM images LIMIT 0").column_names


def test_sliders_of_an_edit_run_move_its_source(server: Server) -> None:
    _, _, body = server.ask("/picture", run=EDITED, key=RTL)

    assert b'name="direction.turn"' in body
    assert b"/render?run=runs%2Fphotos" in body


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"direction.turn": 99}, "expected -3 to 3"),
        ({"direction.nothing": 1}, "not known"),
        ({"direction.turn": "x"}, "expected numbers"),
        ({"direction.turn": "nan"}, "expected -3 to 3"),
    ],
)
def test_a_slider_stays_in_its_range(server: Server, asked: dict[str, object], said: str) -> None:
    status, _, body = server.ask("/render", run=RUN, key=EVIL, **asked)

    assert status == 400
    assert said in body.decode()


def test_neighbours_are_the_nearest_by_cosine(server: Server) -> None:
    _, _, body = server.ask("/neighbours", run=RUN, key="face-00.png")

    rows = query(str(server.root / RUN), "SELECT * FROM latents WHERE status = 'ok'").to_pylist()
    codes = {r["sample_key"]: np.array(r["w_plus"], np.float64) for r in rows}
    unit = {k: c / np.linalg.norm(c) for k, c in codes.items()}
    cosine = {k: float(unit["face-00.png"] @ c) for k, c in unit.items() if k != "face-00.png"}
    wanted = sorted(cosine.values(), reverse=True)[:12]
    found = [float(x) for x in re.findall(r'"value">([\d.]+)<', body.decode())]
    np.testing.assert_allclose(found, wanted, rtol=6e-3)  # three digits


def test_neighbours_come_from_the_index_where_there_is_one(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "photos"
    shutil.copytree(server.root / RUN, run)
    library = Library(str(tmp_path))
    by_scan = nearest(library.open("photos"), EVIL, 5)
    assert run_app(["index", str(run), "--engine", "inline"]) == 0

    by_index = nearest(library.open("photos"), EVIL, 5)

    assert "refinery index" in by_scan.advice
    assert by_scan.measure == "cosine"
    assert by_index.advice == ""
    rows = query(str(run), "SELECT * FROM latents WHERE status = 'ok'").to_pylist()
    codes = {r["sample_key"]: np.array(r["w_plus"]) for r in rows}
    far = {k: float(np.linalg.norm(c - codes[EVIL])) for k, c in codes.items() if k != EVIL}
    np.testing.assert_allclose([v for _, v in by_index.found], sorted(far.values())[:5], rtol=1e-3)
    assert [card.name for card in library.cards()] == ["photos"]  # an index is no run to look at


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT * FROM read_text('/etc/passwd')", "nothing else"),
        ("COPY (SELECT 1) TO 'refinery-browse-escaped.csv'", "one SELECT"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("ATTACH 'x.db'", "one SELECT"),
        ("SELECT nonsense FROM samples", "nonsense"),
    ],
)
def test_the_sql_box_reads_the_run_and_nothing_else(server: Server, sql: str, said: str) -> None:
    for format in ("page", "parquet"):
        status, _, body = server.post("/sql", run=RUN, sql=sql, format=format)
        assert status == 400
        assert said in html.unescape(body.decode())
        assert b"root:" not in body
    assert not Path("refinery-browse-escaped.csv").exists()


def test_a_photo_is_inverted_and_edited(server: Server) -> None:
    picture = stored(server, "face-00.png", "input")
    before = tree(server.root)

    headers = {"Accept": "application/json"}
    status, _, body = server.ask("/photo", method="POST", body=picture, headers=headers, run=RUN)

    address = json.loads(body)["address"]
    assert status == 200
    page = server.ask(address)[2].decode()
    token = re.search(r"photo=([\w-]+)", address)
    assert token
    assert 'name="direction.turn"' in page
    seen = server.ask("/photo/picture", photo=token[1], which="input")[2]
    np.testing.assert_array_equal(pixels(seen), pixels(picture))
    plain = server.ask("/render", photo=token[1])[2]
    turned = server.ask("/render", photo=token[1], **{"direction.turn": 2})[2]
    assert np.abs(pixels(plain) - pixels(turned)).max() > 4
    assert tree(server.root) == before


def test_a_selection_leaves_as_parquet(server: Server, tmp_path: Path) -> None:
    keys = [EVIL, RTL, "zz-broken.png"]
    status, headers, body = server.post(
        "/dataset", run=RUN, keys=json.dumps(keys), format="parquet"
    )

    assert status == 200
    assert 'filename="selection-3.parquet"' in headers["content-disposition"]
    path = tmp_path / "taken.parquet"
    path.write_bytes(body)
    table = pq.read_table(path)
    assert sorted(table["sample_key"].to_pylist()) == sorted(keys)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    by_key = {row["sample_key"]: row for row in loaded}
    assert by_key["zz-broken.png"]["inversion"] is None
    picture = np.asarray(by_key[EVIL]["inversion"]).astype(int)
    np.testing.assert_array_equal(picture, pixels(stored(server, EVIL, "inversion")))
    text = "'" + EVIL.replace("'", "''") + "'"
    sql = f"SELECT w_plus FROM latents WHERE sample_key = {text}"
    expected = query(str(server.root / RUN), sql)["w_plus"].to_pylist()[0]
    assert by_key[EVIL]["w_plus"] == expected


def test_a_selection_leaves_as_a_folder_without_hostile_names(server: Server) -> None:
    _, _, body = server.post("/dataset", run=RUN, keys=json.dumps(list(NAMES)), format="folder")

    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        names = archive.namelist()
        assert all(re.fullmatch(r"\d{6}-\d\d\.png|metadata\.jsonl", name) for name in names)
        lines = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        assert {line["sample_key"] for line in lines} == set(NAMES)
        line = next(line for line in lines if line["sample_key"] == LONG)
        assert archive.read(line["inversion_file_name"]) == stored(server, LONG, "inversion")


def test_sql_answers_and_downloads(server: Server) -> None:
    sql = "SELECT sample_key, psnr FROM latents WHERE status = 'ok' ORDER BY psnr LIMIT 3"

    _, _, page = server.post("/sql", run=RUN, sql=sql, format="page")
    _, _, table = server.post("/sql", run=RUN, sql=sql, format="parquet")

    expected = query(str(server.root / RUN), sql)
    assert pq.read_table(io.BytesIO(table)).to_pylist() == expected.to_pylist()
    assert page.decode().count('<td class="n">') == 3


def test_the_sql_box_answers_its_own_examples(server: Server) -> None:
    _, _, page = server.ask("/sql", run=RUN)
    examples = re.findall(r'<pre tabindex="0"><code>(.+?)</code>', page.decode())

    assert len(examples) == 3
    for example in examples:
        status, _, body = server.post("/sql", run=RUN, sql=html.unescape(example), format="page")
        assert status == 200, body.decode()


def test_statistics_tell_of_drift(server: Server) -> None:
    _, _, body = server.ask("/statistics", run=RUN, against=EDITED)

    text = body.decode()
    assert "Clusters of the codes" in text
    assert "Against" in text
    assert "moved by 0 standard deviations" in text  # the codes are the same


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize("path", PAGES)
def test_only_runs_of_the_root_can_be_asked_for(server: Server, path: str) -> None:
    for run in ("../outside/secret", "link/secret", "/etc", str(server.root / RUN), "", "x\0y"):
        status, _, body = server.ask(path, run=run, key="face-00.png")
        assert status == 404, (path, run)
        assert b"Traceback" not in body


@pytest.mark.parametrize(
    "key", ["../secret.txt", CLIMBING + "x", "/etc/passwd", "", "%00", "' OR 1=1"]
)
def test_only_samples_can_be_asked_for(server: Server, key: str) -> None:
    for path in ("/picture", "/render", "/stored"):
        status, _, body = server.ask(path, run=RUN, key=key, column="inversion")
        assert status == 404
        assert b"not for you" not in body
    assert server.ask("/stored", run=RUN, key=EVIL, column="../../x")[0] == 404
    assert server.ask("/thumb", run=RUN, shard=99, key=EVIL, column="input")[0] == 404


@pytest.mark.parametrize(
    "path", ["/static/../browse.py", "/static/..%2f..%2fsecret.txt", "/..%2fsecret.txt", "/docs"]
)
def test_no_file_is_served_by_its_path(server: Server, path: str) -> None:
    assert server.ask(path)[0] == 404


def test_another_host_is_refused(server: Server) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1:1", "localhost"):
        assert server.ask("/", headers={"Host": host})[0] == 403
    assert server.ask("/", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_another_page_can_neither_post_nor_embed(server: Server) -> None:
    evil = {"Origin": "https://evil.example"}
    for path in ("/sql", "/dataset", "/photo"):
        status, headers, _ = server.ask(path, method="POST", body=b"run=x", headers=evil)
        assert status == 403
        assert "access-control-allow-origin" not in headers
    for origin in ("null", f"http://127.0.0.1:{server.port + 1}"):
        assert server.ask("/sql", method="POST", body=b"", headers={"Origin": origin})[0] == 403
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert server.ask("/stored", run=RUN, key=EVIL, column="input", headers=embedded)[0] == 403
    _, headers, _ = server.ask("/grid", run=RUN, headers=evil)
    assert "access-control-allow-origin" not in headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"


def test_uploads_have_a_limit(server: Server) -> None:
    large = b"\x89PNG" + bytes(UPLOAD_BYTES)
    status, _, body = server.ask("/photo", method="POST", body=large, run=RUN)
    assert status == 413
    assert str(UPLOAD_BYTES) in body.decode()


def test_an_upload_of_unsaid_length_is_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=100) as connection:
        head = (
            f"POST /photo?run=runs%2Fphotos HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            f"Origin: {server.address}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
        answer = b""
        try:
            for _ in range(2 * UPLOAD_BYTES // 0x100000):
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            answer = connection.recv(200)
        except ConnectionResetError:
            answer = b"HTTP/1.1 413"
    assert b" 413" in answer


@pytest.mark.parametrize("kind", ["bomb", "text", "svg", "empty", "truncated"])
def test_a_hostile_picture_is_refused_in_words(server: Server, kind: str) -> None:
    data = {
        "bomb": bomb(),
        "text": b"#!/bin/sh\necho hello",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "empty": b"",
        "truncated": stored(server, "face-00.png", "input")[:60],
    }[kind]
    status, headers, body = server.ask(
        "/photo", method="POST", body=data, run=RUN, headers={"Accept": "application/json"}
    )

    assert status == 422
    assert headers["content-type"] == "application/json"
    assert ("pixels" if kind == "bomb" else "picture" if kind != "empty" else "empty") in (
        json.loads(body)["error"]
    )


def bomb() -> bytes:
    """30,000 x 30,000 pixels in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("keys", ["", "no json", "{}", "[]", "[1]", '["nobody"]'])
def test_a_selection_without_samples_is_refused(server: Server, keys: str) -> None:
    status, _, body = server.post("/dataset", run=RUN, keys=keys, format="parquet")

    assert status in (400, 404)
    assert b"Traceback" not in body


def test_browsing_changes_no_run(server: Server) -> None:
    before = tree(server.root)

    for run in (RUN, EDITED):
        for path in PAGES:
            server.ask(path, run=run, key=EVIL)

    assert tree(server.root) == before


# ------------------------------------------------------------------ the command


def test_a_place_without_runs_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["browse", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert "no run here" in said
    assert "Traceback" not in said


def test_a_taken_port_is_one_line(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(["browse", str(server.root), "--port", str(server.port)]) == 2
    assert f"port {server.port}" in capfd.readouterr().err


def test_it_listens_on_loopback_only(server: Server) -> None:
    if not os.path.exists("/proc/net/tcp"):
        pytest.skip("no /proc/net/tcp here")
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    places = {line.split()[1] for line in lines if line.split()[3] == "0A"}
    assert {p for p in places if p.endswith(f":{server.port:04X}")} == {
        f"0100007F:{server.port:04X}"
    }

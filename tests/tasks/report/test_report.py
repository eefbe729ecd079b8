"""The report of whole runs, as text and in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from models.errors import LedgerError
from tasks.job import JobConfig, MethodConfig, OutputConfig
from tasks.report import write_report
from tasks.report.look import CSS
from tasks.run import ledger, run_json
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker
from tasks.run.parts import Layout, write_parts
from tasks.run.rows import Row, encode_picture
from tests.tasks.small_run import DECLARED

ROWS = 10
GENERATOR_HASH = "9f3c" * 16
EVIL = '"><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(2)>'


def make_job(**changes: object) -> JobConfig:
    chain = (MethodConfig(name="e4e"), MethodConfig(name="wplus", settings={"steps": 20}))
    return JobConfig(**{"generator": "faces64", "methods": chain, **changes})


def make_rows(shard: int, key: str, error: str, size: int) -> list[Row]:
    """Ten rows: number 9 failed; `trunk_distance` rises with the row's number over all shards."""
    rng = np.random.default_rng(shard)
    rows = []
    for index in range(ROWS):
        at = shard * ROWS + index
        row = Row(sample_key=f"{key}{at:03d}", image_uri="in", image_sha256="00", seed=at)
        rows.append(row)
        if index == 9:
            row.fail("decode", error)
            continue
        row.w_plus = rng.standard_normal((4, 8)).astype(np.float32)
        row.metrics = {"mse": at / 100, "psnr": 40.0 - at, "trunk_distance": at / 10}
        smooth = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        big = np.asarray(Image.fromarray(smooth).resize((size, size), Image.Resampling.BICUBIC))
        row.pictures = {name: encode_picture(big, "png") for name in ("input", "inversion")}
    return rows


def make_run(
    uri: str,
    *,
    job: JobConfig | None = None,
    shards: int = 3,
    given_up: int = 0,
    key: str = "face-",
    error: str = "cannot read the picture: 12 bytes of an unknown format",
    notes: tuple[str, ...] = (),
    size: int = 64,
    rows_of: Callable[[int], list[Row]] | None = None,
) -> str:
    """A run written by the real writers, with made-up values."""
    job = job or make_job()
    manifest = ManifestInfo(shards + given_up, None, 1000, "ab" * 32)
    declared = replace(DECLARED, pictures=job.output.pictures)
    hashes = {"generator": GENERATOR_HASH}
    run = run_json.create_run(uri, job, manifest, hashes, "0.1.0+g123", declared)
    layout = Layout(
        method="e4e+wplus",
        metrics=("mse", "psnr", "trunk_distance"),
        shape=(4, 8),
        output=job.output,
    )
    for shard in range(shards):
        rows = rows_of(shard) if rows_of else make_rows(shard, key, error, size)
        failed = sum(row.error_kind is not None for row in rows)
        marker = Marker(
            shard=shard,
            attempt=f"a{shard}",
            run_id=run.run_id,
            rows=len(rows),
            failed=failed,
            parts=write_parts(rows, layout, run, shard, f"a{shard}"),
            seconds={"read": 0.5, "decode": 0.5, "invert": 3.0, "score": 0.5, "write": 0.5},
            wall_s=5.0,
            failures={"decode": failed} if failed else {},
            device="cpu",
            code_version="0.1.0+g123",
            notes=notes,
            started_at=f"2026-11-20T12:00:{shard * 5:02d}.000+00:00",
            finished_at=f"2026-11-20T12:00:{shard * 5 + 5:02d}.000+00:00",
        )
        ledger.write_marker(uri, marker)
    for shard in range(shards, shards + given_up):
        ledger.quarantine(uri, shard, error, attempts=3)
    return uri


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._is_style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr":  # a place to break a name, which stays one word
            self.text = self.text.removesuffix(" ")
            return
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._is_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._is_style = False

    def handle_data(self, data: str) -> None:
        if not self._is_style:
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def facts_of(html: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", html))


# ------------------------------------------------------------------ what it says


def test_report_states_the_facts_of_the_run(tmp_path: Path) -> None:
    uri = make_run(str(tmp_path / "faces"), given_up=1, notes=("batch lowered from 16 to 8",))
    ledger.seal(uri)

    written = write_report(uri)

    assert written == f"{uri}/report.html"
    html = Path(written).read_text()
    facts = facts_of(html)
    assert facts["Rows"] == "30"
    assert facts["Failed rows"] == "3"
    assert facts["Quarantined shards"] == "1"
    assert facts["Images/s"] == "2"  # 30 rows in 15 s
    assert facts["Method chain"] == "e4e \N{RIGHTWARDS ARROW} wplus"
    assert facts["Shards"] == "3 of 4"
    assert facts["Device"] == "cpu"
    assert facts["Working time"] == "15.0 s"
    assert facts["First shard started"] == "2026-11-20 12:00 UTC"
    assert facts["Code version"] == "0.1.0+g123"
    assert facts["Generator"] == "faces64"
    assert facts["Generator sha256"] == GENERATOR_HASH
    assert facts["Run id"] == run_json.run_handle(uri).run_id
    text = Page(html).text
    assert "Complete and sealed" in text
    assert "batch lowered from 16 to 8 (3 shards)" in text
    assert "Stage Time Share Per row" in text
    assert "invert 9.00 s 60.0 % 300 ms" in re.sub(r"\s+", " ", text)


def test_pictures_are_the_stored_ones_best_first_and_worst_last(tmp_path: Path) -> None:
    uri = make_run(str(tmp_path / "run"))

    html = Path(write_report(uri)).read_text()

    ranks = ("Original of", "Inversion of")
    images = [i for i in Page(html).all("img") if i["alt"].startswith(ranks)]
    alts = [image["alt"] for image in images]
    assert alts[0] == "Original of face-000"
    assert alts[1] == "Inversion of face-000, trunk_distance 0"
    assert "Inversion of face-028, trunk_distance 2.80" in alts  # 029 failed
    assert len(alts) == 2 * 3 * 8
    stored = {row.sample_key: row for row in make_rows(0, "face-", "", 64)}["face-000"]
    data = images[1]["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == stored.pictures["inversion"]


def test_failures_and_quarantine_are_listed_with_reasons(tmp_path: Path) -> None:
    uri = make_run(str(tmp_path / "run"), given_up=1, error="cut off at byte 7")

    text = re.sub(r"\s+", " ", Page(Path(write_report(uri)).read_text()).text)

    assert "Kind Rows decode 3" in text
    assert "face-009 decode cut off at byte 7" in text
    assert "Shard Attempts Reason 3 3 cut off at byte 7" in text
    assert "Not sealed: 3 of 4 shards committed." in text


def test_report_is_replaced_when_the_run_goes_on(tmp_path: Path) -> None:
    uri = str(tmp_path / "run")
    write_report(make_run(uri, shards=1, given_up=1))

    # Shard 1, given up before, is committed after all.
    write_report(make_run(uri, shards=2))

    facts = facts_of((tmp_path / "run/report.html").read_text())
    assert (facts["Rows"], facts["Quarantined shards"]) == ("20", "0")


def test_large_pictures_are_reduced_for_the_page(tmp_path: Path) -> None:
    uri = make_run(str(tmp_path / "run"), shards=1, size=400)

    page = Page(Path(write_report(uri)).read_text())

    data = page.all("img")[0]["src"].removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (384, 384)
    assert not page.all("input")  # pixels of such a picture need no smoothing


# ------------------------------------------------------------------ unusual runs


def test_run_without_a_commit(tmp_path: Path) -> None:
    uri = make_run(str(tmp_path / "run"), shards=0, given_up=2)

    text = Page(Path(write_report(uri)).read_text()).text

    assert "0 of 2 shards committed" in text
    assert "No pictures to show" in text
    assert "No shard is committed yet" in text


def test_run_in_which_every_row_failed(tmp_path: Path) -> None:
    def rows_of(shard: int) -> list[Row]:
        return make_rows(shard, "face-", "no picture", 64)[9:]

    uri = make_run(str(tmp_path / "run"), shards=2, rows_of=rows_of)

    html = Path(write_report(uri)).read_text()

    assert facts_of(html)["Failed rows"] == "2"
    assert "No metric has a value yet" in html


def test_run_that_stores_inversions_only(tmp_path: Path) -> None:
    job = make_job(output=OutputConfig(pictures=("inversion",)))

    page = Page(Path(write_report(make_run(str(tmp_path / "run"), job=job))).read_text())

    alts = {image["alt"].split()[0] for image in page.all("img")}
    assert alts == {"Inversion", "Cluster", "Outlier"}
    assert page.text.count("not stored") == 24


def test_report_in_another_file_system() -> None:
    uri = make_run("memory://report-test/run")
    try:
        assert write_report(uri) == "memory://report-test/run/report.html"
        html = fsspec.filesystem("memory").cat_file("/report-test/run/report.html").decode()
        assert facts_of(html)["Rows"] == "30"
    finally:
        fsspec.filesystem("memory").rm("/report-test", recursive=True)


def test_no_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no run here"):
        write_report(str(tmp_path / "nothing"))


# ------------------------------------------------------------------ hostile and accessible


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    job = make_job(generator=EVIL)
    folder = tmp_path / "<b>run&amp;"
    uri = make_run(str(folder), job=job, given_up=1, key=EVIL, error=EVIL, notes=(EVIL,))

    html = Path(write_report(uri)).read_text()

    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "b", "base", "form"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert page.text.count("<script>alert(1)</script>") >= 5
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_structure_serves_assistive_technology(tmp_path: Path) -> None:
    page = Page(Path(write_report(make_run(str(tmp_path / "run"), given_up=1))).read_text())

    assert page.all("html") == [{"lang": "en"}]
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("aria-label") and svg["role"] == "img" for svg in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= targets
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme: int) -> None:
    block = CSS.split(":root {")[1 + theme].split("}")[0]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))

    for ink in ("ink", "soft", "median", "bad", "good"):
        for ground in ("paper", "sheet"):
            bright, dark = sorted((luminance(colours[ink]), luminance(colours[ground])))[::-1]
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def report_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    long = "a-very-long-file-name-without-any-space-" * 4
    uri = make_run(str(folder / "run"), given_up=1, key=long, error="no_space_" * 60)
    return write_report(uri)


def run_chromium(program: str, folder: Path, *arguments: str) -> str:
    """Start a headless browser with a profile of its own and return what it prints."""
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    return done.stdout


def test_no_width_scrolls_sideways(chromium: str, report_html: str, tmp_path: Path) -> None:
    """The page in frames of a phone's, a tablet's and a desktop's width, measured by a script."""
    html = Path(report_html).read_text()
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    outer = tmp_path / "frames.html"
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0"></iframe>'
        for width in (320, 390, 768, 1280)
    )
    script = """
    const html = JSON.parse(document.getElementById("page").textContent);
    Promise.all([...document.querySelectorAll("iframe")].map(frame => new Promise(done => {
      frame.onload = () => {
        const page = frame.contentDocument, root = page.documentElement;
        const images = [...page.images];
        const text = page.querySelector("svg text");
        done({width: frame.clientWidth, scroll: root.scrollWidth,
          images: images.filter(image => image.naturalWidth == 64).length,
          shown: images[0].getBoundingClientRect().width,
          look: frame.contentWindow.getComputedStyle(images[0]).imageRendering,
          text: frame.contentWindow.getComputedStyle(text).fontSize});
      };
      frame.srcdoc = html;
    }))).then(found => { document.body.textContent = JSON.stringify(found); });
    """
    embedded = json.dumps(html).replace("</", "<\\/")
    outer.write_text(
        f'<body>{frames}<script type="application/json" id="page">{embedded}</script>'
        f"<script>{script}</script></body>"
    )

    dom = run_chromium(
        chromium, tmp_path, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()
    )

    found = re.search(r"<body>(\[.*\])", dom)
    assert found, dom[:500]
    for frame in json.loads(found[1]):
        assert frame["scroll"] == frame["width"], frame
        assert frame["images"] == 64  # pairs, clusters, outliers
        assert frame["shown"] == 128  # twice its 64 px: every pixel is a square
        assert frame["look"] == "pixelated"
        assert frame["text"] == "12px"


@pytest.mark.parametrize(("scheme", "width", "is_dark"), [(0, 1280, True), (1, 390, False)])
def test_page_follows_the_readers_colour_scheme(
    chromium: str, report_html: str, tmp_path: Path, scheme: int, width: int, is_dark: bool
) -> None:
    shot = tmp_path / "shot.png"

    run_chromium(
        chromium,
        tmp_path,
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},1200",
        f"--screenshot={shot}",
        Path(report_html).as_uri(),
    )

    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (1200, width, 3)
    paper = (0x15, 0x18, 0x1C) if is_dark else (0xFF, 0xFF, 0xFF)
    assert tuple(pixels[3, 3]) == paper
    # Text and pictures are there: a blank page has one colour.
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500

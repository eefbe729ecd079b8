"""A person at `refinery browse`: a headless Chromium clicks through it, and what appears is looked
at. The page's content security policy is in force throughout."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.run.query import query
from tests.browse.conftest import EDITED, EMOJI, EVIL, LONG, NAMES, RTL, RUN, Server

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)
TIMEOUT_MS = 60_000  # of a loaded machine
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: "sync_api.Browser", server: Server) -> Iterator[Callable[..., "sync_api.Page"]]:
    """Open a page of the server; at the end nothing may have complained or left the server."""
    contexts, complaints, places = [], [], []

    def open_page(path: str, **options: object) -> "sync_api.Page":
        context = chromium.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: places.append(request.url))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.goto(server.address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    away = [p for p in places if not p.startswith((server.address, "data:", "blob:"))]
    assert away == []


def grid(run: str = RUN, **asked: object) -> str:
    from tasks.browse.address import link

    return link("/grid", run=run, **asked)


def picture(key: str, run: str = RUN) -> str:
    from tasks.browse.address import link

    return link("/picture", run=run, key=key)


def seen(page: "sync_api.Page", selector: str) -> np.ndarray:
    """What an element shows, as pixels."""
    shot = page.locator(selector).first.screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def loaded(page: "sync_api.Page", selector: str) -> None:
    """Wait until the pictures behind a selector are there."""
    for image in page.locator(selector).all():
        image.scroll_into_view_if_needed()
        sync_api.expect(image).to_have_js_property("complete", True, timeout=TIMEOUT_MS)
        assert image.evaluate("image => image.naturalWidth") > 0


def move(page: "sync_api.Page", slider: str, value: float) -> None:
    page.locator(f"input[name='{slider}']").fill(str(value))
    page.wait_for_selector(f'#live[data-values*=\'"{slider}":"{value:g}"\']')


# ------------------------------------------------------------------ clicking through


def test_from_the_index_to_a_picture(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit("/")
    assert page.locator(".card h2").all_inner_texts() == [EDITED, RUN]
    loaded(page, ".strip img")

    page.get_by_role("link", name=RUN).click()
    loaded(page, ".shots img")
    assert "17 rows" in page.get_by_role("status").first.inner_text()
    assert page.locator(".tile").count() == 17

    page.get_by_label("Search").fill("astronaut")
    page.get_by_role("button", name="Apply").click()
    assert page.locator(".tile .key").get_attribute("title") == EMOJI
    page.locator(".tile > a").click()

    assert page.get_by_role("heading", level=1).inner_text() == EMOJI
    assert len(np.unique(seen(page, "#live").reshape(-1, 3), axis=0)) > 50
    loaded(page, ".stored img")
    text = page.locator("main").inner_text()
    assert "psnr" in text
    assert "code version" in text


def test_filter_by_a_range_and_in_sql(
    visit: Callable[..., "sync_api.Page"], server: Server
) -> None:
    rows = query(str(server.root / RUN), "SELECT * FROM latents WHERE status = 'ok'").to_pylist()
    bound = sorted(row["psnr"] for row in rows)[5]
    page = visit(grid())

    page.locator("summary").click()
    page.get_by_label("psnr at most").fill(str(bound))
    page.get_by_label("Condition in SQL").fill("sample_key LIKE 'face%'")
    page.get_by_label("Sort by").select_option("psnr")
    page.get_by_role("button", name="Apply").click()

    wanted = [r for r in rows if r["psnr"] <= bound and r["sample_key"].startswith("face")]
    wanted.sort(key=lambda r: (r["psnr"], r["sample_key"]))
    titles = [key.get_attribute("title") for key in page.locator(".tile .key").all()]
    assert titles == [r["sample_key"] for r in wanted]
    assert page.get_by_label("psnr at most").input_value() == str(bound)

    page.get_by_label("Condition in SQL").fill("nonsense >")
    page.get_by_role("button", name="Apply").click()
    assert "syntax error" in page.get_by_role("alert").inner_text()
    assert page.locator(".tile").count() == 0


def test_sliders_change_the_picture_and_come_back(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(picture("face-01.png"))
    before = seen(page, "#live")

    move(page, "direction.turn", 2)
    turned = seen(page, "#live")
    assert np.abs(turned - before).mean() > 1
    move(page, "domain.oil", 0.5)
    assert np.abs(seen(page, "#live") - turned).mean() > 1
    command = page.locator("#command").inner_text()
    assert re.search(r"refinery edit \S+photos OUT --edit \S+turn\.json=\+2 --domain ", command)

    compare = page.get_by_role("button", name="Hold to compare")
    compare.hover()
    page.mouse.down()
    page.wait_for_selector("#live[src^='/render']")
    loaded(page, "#live")
    np.testing.assert_array_equal(seen(page, "#live"), before)
    page.mouse.up()

    page.get_by_role("button", name="Reset").click()
    page.wait_for_selector("#live[data-values='{}']")
    np.testing.assert_array_equal(seen(page, "#live"), before)
    assert not page.locator("#command").is_visible()


def test_neighbours_by_click(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(picture("face-02.png"))

    page.get_by_role("button", name="Find them").click()
    page.wait_for_selector(".near .tile")
    loaded(page, ".near img")
    values = [float(v) for v in page.locator(".near .value").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    first = page.locator(".near .tile .key").first.get_attribute("title")
    page.locator(".near .tile a").first.click()
    assert page.get_by_role("heading", level=1).inner_text() == first


def test_a_photo_of_ones_own(
    visit: Callable[..., "sync_api.Page"], tmp_path: Path, face_bytes: list[bytes]
) -> None:
    path = tmp_path / "me <b>.png"
    path.write_bytes(face_bytes[3])
    page = visit(grid())
    page.get_by_role("link", name="Your photo").click()

    page.locator("#file").set_input_files(path)
    page.wait_for_selector("#live")
    loaded(page, ".stored img")
    before = seen(page, "#live")
    move(page, "direction.turn", -2)
    assert np.abs(seen(page, "#live") - before).mean() > 1
    assert "psnr" in page.locator("main").inner_text()


def test_a_file_that_is_no_picture_is_named_so(
    chromium: "sync_api.Browser", server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "notes.png"
    path.write_text("<script>alert(1)</script>")
    with chromium.new_context(viewport=DESK) as context:
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(f"{server.address}/photo?run=runs%2Fphotos")
        page.locator("#file").set_input_files(path)
        message = page.locator("#progress", has_text="That did not work")
        assert "not a picture" in message.inner_text()


def test_the_sql_box(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(grid())
    page.get_by_role("link", name="SQL").click()
    page.locator("textarea").fill(
        "SELECT sample_key, psnr, inversion FROM latents JOIN images USING (sample_key) "
        "ORDER BY psnr LIMIT 4"
    )
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("td img")
    loaded(page, "td img")
    assert page.locator("tbody tr").count() == 4

    page.locator("tbody a").first.click()
    assert page.get_by_role("heading", level=1).is_visible()


def test_a_selection_across_pages_is_taken_away(
    visit: Callable[..., "sync_api.Page"], tmp_path: Path
) -> None:
    page = visit(grid(q="face"), accept_downloads=True)
    bar = page.locator(".selection")
    assert not bar.is_visible()

    page.get_by_label("Select face-03.png").check()
    page.get_by_label("Search").fill("zz")
    page.get_by_role("button", name="Apply").click()
    page.get_by_label("Select zz-broken.png").check()
    assert "2 selected" in bar.inner_text()
    with page.expect_download() as started:
        bar.get_by_role("button", name="Parquet").click()
    table = pq.read_table(started.value.path())
    assert sorted(table["sample_key"].to_pylist()) == ["face-03.png", "zz-broken.png"]

    page.goto(page.url.replace("q=zz", "q=face"))
    bar.get_by_role("button", name=re.compile("^All")).click()
    page.get_by_text("12 selected").wait_for()
    bar.get_by_role("button", name="Clear").click()
    assert not bar.is_visible()


def test_statistics_show_and_lead_on(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(grid())
    page.get_by_role("link", name="Statistics").click()
    loaded(page, ".tiles img")
    assert page.locator("svg rect.bar").count() > 5
    page.get_by_label("Compare with").select_option(EDITED)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("moved by").wait_for()
    page.locator(".tiles a").first.click()
    assert page.locator("#live").is_visible()


# ------------------------------------------------------------------ keyboard, narrow, hostile


def test_all_of_it_by_keyboard(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(grid())
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"

    links = page.locator(".tile > a")
    links.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("x")
    assert page.locator(".selection").is_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert links.nth(1).evaluate("link => link === document.activeElement")
    outline = links.nth(1).evaluate("link => getComputedStyle(link).outlineStyle")
    assert outline == "solid"
    name = page.locator(".tile .key").nth(1).get_attribute("title")
    page.keyboard.press("Enter")
    page.wait_for_selector("#live, .problem")
    assert page.get_by_role("heading", level=1).inner_text() == name

    slider = page.locator("input[name='direction.turn']")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector('#live[data-values=\'{"direction.turn":"0.1"}\']')


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways_and_no_word_breaks(
    visit: Callable[..., "sync_api.Page"], viewport: dict[str, int], scheme: str
) -> None:
    page = visit("/", viewport=viewport, color_scheme=scheme)
    paper = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    paths = ["/", grid(), grid(run=EDITED), "/sql?run=runs%2Fphotos"]
    paths += ["/statistics?run=runs%2Fphotos", "/photo?run=runs%2Fphotos"]
    paths += [picture(key) for key in (EVIL, RTL, LONG)]
    for path in paths:
        page.goto(page.url.split("/", 3)[0] + "//" + page.url.split("/")[2] + path)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == viewport["width"], path
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        assert page.evaluate(BROKEN_WORDS) == [], path


BROKEN_WORDS = """(() => {
  const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const holder = node.parentElement;
    if (!holder.checkVisibility() || holder.closest("svg, option")) continue;
    for (const word of node.data.matchAll(/[\\p{L}\\p{M}]{2,24}/gu)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1) broken.push(word[0]);
    }
  }
  return broken;
})()"""
"""Words of letters that stand on two lines; a sha256 or a token is no word."""


def test_right_to_left_names_do_not_turn_the_page(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(picture(RTL))
    heading = page.get_by_role("heading", level=1)
    assert heading.inner_text() == RTL
    assert heading.evaluate("h => getComputedStyle(h).direction") == "ltr"
    assert heading.bounding_box()["x"] < 40


def test_the_picture_stays_in_sight_on_a_phone(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(picture("face-01.png"), viewport=PHONE)
    page.locator("input[name='domain.oil']").scroll_into_view_if_needed()
    box = page.locator("#live").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] < PHONE["height"]


def test_hostile_names_run_no_script(visit: Callable[..., "sync_api.Page"]) -> None:
    page = visit(grid())
    loaded(page, ".shots img")
    titles = {key.get_attribute("title") for key in page.locator(".tile .key").all()}
    assert set(NAMES) <= titles
    page.get_by_label(f"Select {EVIL}").check()
    kept = page.evaluate("sessionStorage.getItem('selected:runs/photos')")
    assert json.loads(kept) == [EVIL]

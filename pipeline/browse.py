"""`refinery browse`: the pages of `tasks.browse` on loopback. Reads runs and writes nothing but
thumbnails beside them."""

import json
import socket
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
)
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from models.errors import ConfigError, LedgerError, RefineryError, SampleError
from pipeline.browse_guard import guard
from tasks.browse import dataset, pages, sql
from tasks.browse.address import Parameters, first, link, wish_of
from tasks.browse.library import BrowsedRun, Library, UnknownError
from tasks.browse.neighbours import nearest
from tasks.browse.pictures import media_type
from tasks.browse.studio import Photo
from tasks.browse.table import KEYS
from tasks.report.look import CSS
from tasks.run.export import export
from tasks.run.query import query
from tasks.run.rows import encode_picture

UPLOAD_BYTES = 20_000_000
FORM_BYTES = 16_000_000
PHOTOS = 16
"""Photos that are remembered; the oldest goes first."""
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
STATIC = {
    "style.css": ("text/css", CSS),
    "browse.js": ("text/javascript", (files("tasks.browse") / "static/browse.js").read_text()),
}


class TooLargeError(ConfigError):
    """A request has more bytes than it may have."""


STATUS: Mapping[type[RefineryError], int] = {
    UnknownError: 404,
    TooLargeError: 413,
    ConfigError: 400,
    SampleError: 422,
}


class Photos:
    """Photos that were uploaded, by a name that nobody guesses; in memory only."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[str, Photo]] = OrderedDict()

    def add(self, run: str, photo: Photo) -> str:
        token = pages.new_token()
        self._found[token] = run, photo
        while len(self._found) > PHOTOS:
            self._found.popitem(last=False)
        return token

    def get(self, token: str) -> tuple[str, Photo]:
        """The run whose methods inverted it, and the photo.

        Raises:
            UnknownError: it is not remembered.
        """
        if token not in self._found:
            raise UnknownError("this photo is no longer here; drop it again")
        return self._found[token]


def parameters_of(request: Request) -> Parameters:
    """The query string, values by name."""
    return parse_qs(request.url.query, keep_blank_values=True)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        TooLargeError: it is, or says that it is, larger than the limit; the rest is not read.
    """
    said = request.headers.get("content-length", "0")
    body = bytearray()
    if not said.isdigit() or int(said) > limit:
        raise TooLargeError(f"{said} bytes; at most {limit} are taken")
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLargeError(f"more than {limit} bytes; no more are taken")
    return bytes(body)


class Site:
    """What each address answers. Only `upload`, `ask` and `take` read what a request carries.

    Args:
        library: the runs that can be asked for.
    """

    def __init__(self, library: Library) -> None:
        self.library, self.photos = library, Photos()

    def _run(self, request: Request) -> tuple[BrowsedRun, Parameters]:
        asked = parameters_of(request)
        return self.library.open(first(asked, "run")), asked

    # ------------------------------------------------------------------ pages

    def index(self) -> Any:
        names = list(self.library.names())
        if len(names) == 1 and self.library.is_single:
            return RedirectResponse(link("/grid", run=names[0]))
        return pages.index_page(self.library)

    def grid(self, request: Request) -> str:
        return pages.grid_page(*self._run(request))

    def picture(self, request: Request) -> str:
        run, asked = self._run(request)
        return pages.picture_page(self.library, run, first(asked, "key"))

    def neighbours(self, request: Request) -> str:
        run, asked = self._run(request)
        near = nearest(self.library.codes_of(run), first(asked, "key"), pages.NEIGHBOURS)
        return pages.neighbours_part(run, near)

    def statistics(self, request: Request) -> str:
        run, asked = self._run(request)
        return pages.statistics_page(self.library, run, first(asked, "against"))

    def sql(self, request: Request) -> str:
        return pages.sql_page(self._run(request)[0], "", None, "")

    def photo(self, request: Request) -> str:
        run, asked = self._run(request)
        token = first(asked, "photo")
        photo = self.photos.get(token)[1] if token else None
        return pages.photo_page(self.library, run, token, photo)

    def keys(self, request: Request) -> JSONResponse:
        run, asked = self._run(request)
        return JSONResponse(run.table.keys(wish_of(asked, run.table.metrics)))

    # ------------------------------------------------------------------ pictures

    def thumb(self, run: str, shard: int, key: str, column: str) -> Response:
        return _sent(self.library.open(run).pictures.thumbnail(shard, key, column), FOREVER)

    def stored(self, run: str, key: str, column: str) -> Response:
        found = self.library.open(run)
        return _sent(found.pictures.stored(found.shard_of(key), key, column), FOREVER)

    def render(self, request: Request) -> Response:
        asked = parameters_of(request)
        if token := first(asked, "photo"):
            name, photo = self.photos.get(token)
            studio, inversion = self.library.studio(self.library.open(name)), photo.inversion
        else:
            run, key = self._run(request)[0], first(asked, "key")
            studio = self.library.studio(run)
            inversion = studio.sample(run.shard_of(key), key)
        if inversion is None:
            raise UnknownError("this sample was not inverted")
        return _sent(encode_picture(studio.render(inversion, _values(asked)), "png"))

    def photo_picture(self, photo: str, which: str) -> Response:
        name, found = self.photos.get(photo)
        if which == "input":
            return _sent(encode_picture(found.picture, "png"))
        pixels = self.library.studio(self.library.open(name)).render(found.inversion, {})
        return _sent(encode_picture(pixels, "png"))

    # ------------------------------------------------------------------ what a request carries

    async def upload(self, request: Request) -> JSONResponse:
        data = await read_body(request, UPLOAD_BYTES)
        name = first(parameters_of(request), "run")
        token = await run_in_threadpool(self._invert, name, data)
        return JSONResponse({"address": link("/photo", run=name, photo=token)})

    def _invert(self, name: str, data: bytes) -> str:
        run = self.library.open(name)
        if not run.declared.stores_doors:
            raise ConfigError(f"{name} was not made by inverting; choose the run it was made from")
        return self.photos.add(name, self.library.studio(run).invert(data))

    async def ask(self, request: Request) -> Response:
        form = await _form(request)
        run = await run_in_threadpool(self.library.open, first(form, "run"))
        return await run_in_threadpool(_answer, run, first(form, "sql"), first(form, "format"))

    async def take(self, request: Request) -> Response:
        form = await _form(request)
        run = await run_in_threadpool(self.library.open, first(form, "run"))
        return await run_in_threadpool(_dataset, run, _keys(form), first(form, "format"))


def make_app(library: Library, port: int) -> FastAPI:
    """The server of a library's runs.

    Args:
        port: that it will listen on; requests to another host or port are refused.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.port = port
    app.middleware("http")(guard)
    site = Site(library)

    async def failed(request: Request, error: Exception) -> Response:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        if request.headers.get("accept", "").startswith("application/json"):
            return JSONResponse({"error": str(error)}, status)
        return HTMLResponse(pages.error_page(status, str(error)), status)

    app.add_exception_handler(RefineryError, failed)
    for path, answer in {
        "/": site.index,
        "/grid": site.grid,
        "/picture": site.picture,
        "/neighbours": site.neighbours,
        "/statistics": site.statistics,
        "/sql": site.sql,
        "/photo": site.photo,
    }.items():
        app.add_api_route(path, answer, response_class=HTMLResponse)
    for path, answer in {
        "/static/{name}": static,
        "/keys": site.keys,
        "/thumb": site.thumb,
        "/stored": site.stored,
        "/render": site.render,
        "/photo/picture": site.photo_picture,
    }.items():
        app.add_api_route(path, answer, response_model=None)
    for path, answer in {"/photo": site.upload, "/sql": site.ask, "/dataset": site.take}.items():
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    return app


def static(name: str) -> Response:
    """The style sheet and the script."""
    if name not in STATIC:
        raise UnknownError(f"no file {name!r}")
    kind, text = STATIC[name]
    return Response(text, media_type=kind, headers={"Cache-Control": "no-cache"})


def _sent(encoded: bytes | None, headers: dict[str, str] | None = None) -> Response:
    kind = encoded and media_type(encoded)
    if not encoded or not kind:
        raise UnknownError("there is no such picture")
    return Response(encoded, media_type=kind, headers=headers)


def _values(asked: Parameters) -> dict[str, float]:
    """Sliders' values of an address; each has a dot in its name."""
    try:
        return {name: float(values[0]) for name, values in asked.items() if "." in name}
    except ValueError as error:
        raise ConfigError(f"sliders: expected numbers ({error})") from error


async def _form(request: Request) -> Parameters:
    body = await read_body(request, FORM_BYTES)
    try:
        return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=100)
    except ValueError as error:
        raise ConfigError(f"this is no form: {error}") from error


def _keys(form: Parameters) -> list[str]:
    try:
        keys = json.loads(first(form, "keys"))
    except ValueError:
        keys = None
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise ConfigError("no sample is selected")
    if len(keys) > KEYS:
        raise ConfigError(f"{len(keys)} samples are selected; at most {KEYS} can be taken at once")
    return keys


def _answer(run: BrowsedRun, text: str, format: str) -> Response:
    try:
        table = query(run.uri, text)
    except (ConfigError, LedgerError) as error:
        return HTMLResponse(pages.sql_page(run, text, None, str(error)), 400)
    if format in ("parquet", "csv"):
        path = _temporary(f".{format}", lambda path: export(table, str(path)))
        return _download(path, f"answer.{format}")
    return HTMLResponse(pages.sql_page(run, text, sql.shown(table), ""))


def _dataset(run: BrowsedRun, keys: list[str], format: str) -> Response:
    shards = run.table.shards(keys)
    if not shards:
        raise UnknownError(f"{run.name} has none of these samples")
    write, suffix = {
        "parquet": (dataset.write_parquet, ".parquet"),
        "folder": (dataset.write_folder, ".zip"),
    }.get(format, (None, ""))
    if write is None:
        raise ConfigError(f"format: expected parquet or folder, found {format!r}")
    path = _temporary(suffix, lambda path: write(path, run.uri, run.markers, shards))
    return _download(path, f"selection-{len(shards)}{suffix}")


def _temporary(suffix: str, write: Callable[[Path], object]) -> Path:
    """A file that something is written to; none is left where that fails."""
    with tempfile.NamedTemporaryFile(prefix="refinery-", suffix=suffix, delete=False) as file:
        path = Path(file.name)
    try:
        write(path)
    except BaseException:
        path.unlink()
        raise
    return path


def _download(path: Path, name: str) -> Response:
    """A file that is deleted once it is sent."""
    return FileResponse(path, filename=name, background=BackgroundTask(path.unlink))


def listen(port: int) -> socket.socket:
    """A socket on loopback.

    Args:
        port: 0 for a free one.

    Raises:
        ConfigError: it is taken, or not allowed.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
        found.listen()  # who comes before the networks are loaded waits
    except (OSError, OverflowError) as error:
        found.close()
        raise ConfigError(
            f"port {port}: cannot be listened on ({error}); choose another, or 0 for a free one"
        ) from error
    return found


def serve(library: Library, listening: socket.socket) -> None:
    """Answer until Ctrl-C."""
    app = make_app(library, listening.getsockname()[1])
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])

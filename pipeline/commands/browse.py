"""The command that shows runs in a web browser. Heavy imports wait inside."""

from contextlib import suppress

from pipeline.commands.terminal import OK, Run, say


def browse(place: Run, /, *, port: int = 8787, open_browser: bool = False) -> int:
    """Look at RUN, or at all runs below a folder, in a web browser on this computer: filter, sort,
    edit live, drop a photo, ask in SQL, take rows away. Ctrl-C ends it.

    Args:
        place: a run directory, or a folder with runs in it.
        port: to listen on, on loopback only; 0 for a free one.
        open_browser: show it in the default browser at once.
    """
    import webbrowser

    from pipeline.browse import listen, serve
    from tasks.browse.library import Library

    library = Library(place)
    with listen(port) as listening, suppress(KeyboardInterrupt):
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        count = len(library.cards())
        say(f"{count} run{'s' * (count != 1)} at {address}")
        if open_browser:
            webbrowser.open(address)
        serve(library, listening)
    return OK

"""The report of a run: one self-contained HTML page."""

from tasks.storage.files import join, write_bytes


def write_report(run_uri: str, against: str | None = None) -> str:
    """Write `<run>/report.html` from the committed parts, for a finished or an unfinished run.

    Args:
        against: a run to compare distributions with.

    Returns:
        The URI of the page.

    Raises:
        LedgerError: no run at this place, a damaged one, or the page cannot be written.
    """
    # Pictures and templates: who wants only a word of `words` does not wait for them.
    from tasks.report.data import gather
    from tasks.report.page import render_page

    page = render_page(gather(run_uri, against))
    uri = join(run_uri, "report.html")
    write_bytes(uri, page.encode())
    return uri

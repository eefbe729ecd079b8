"""The report of a run: one self-contained HTML page."""

from tasks.report.data import gather
from tasks.report.page import render_page
from tasks.storage.files import join, write_bytes


def write_report(run_uri: str) -> str:
    """Write `<run>/report.html` from the committed parts, for a finished or an unfinished run.

    Returns:
        The URI of the page.

    Raises:
        LedgerError: no run at this place, a damaged one, or the page cannot be written.
    """
    page = render_page(gather(run_uri))
    uri = join(run_uri, "report.html")
    write_bytes(uri, page.encode())
    return uri

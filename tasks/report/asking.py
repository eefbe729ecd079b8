"""Questions in SQL to the views of a run, as the report and the browser ask them."""

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from models.errors import LedgerError
from tasks.report.aggregates import Ask
from tasks.run.query import open_views


@contextmanager
def asking(run_uri: str) -> Iterator[tuple[Ask, dict[str, pa.Schema]]]:
    """SQL over the views of a run, and the schemas of the views by name.

    Raises:
        LedgerError: there is no run, nothing is committed, or (while asking) a part is damaged.
    """
    with open_views(run_uri) as session:

        def ask(sql: str) -> pa.Table:
            try:
                return session.ask(sql)
            except duckdb.Error as error:
                raise LedgerError(
                    f"{run_uri}: a committed part cannot be read ({error}); run `refinery verify`"
                ) from error

        yield ask, {view: ask(f"SELECT * FROM {view} LIMIT 0").schema for view in session.names}

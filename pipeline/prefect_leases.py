"""Where the Prefect server keeps who holds a deployment's slot: in files, with time to come back.

`PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=pipeline.prefect_leases`. Kept in memory, as by default, a
crash of the server would forget the holder, and no later night could begin. But a lease ends in 300
s, and while the server is away nobody can renew one: a server that has just come back would take
the slot of a night that lives, and Prefect ends a night whose renewal is refused.
"""

import time
from uuid import UUID

from prefect.server.concurrency.lease_storage import filesystem

COME_BACK_S = 90.0
"""More than a client waits between two tries: 2^6 s and a fifth, by `PREFECT_CLIENT_MAX_RETRIES` in
deploy/prefect.yaml."""
_started_at = time.monotonic()


class ConcurrencyLeaseStorage(filesystem.ConcurrencyLeaseStorage):
    """Prefect's leases in `PREFECT_HOME`, of which none is over in the server's first moments."""

    async def read_expired_lease_ids(self, limit: int = 100) -> list[UUID]:
        if time.monotonic() - _started_at < COME_BACK_S:
            return []
        return await super().read_expired_lease_ids(limit)

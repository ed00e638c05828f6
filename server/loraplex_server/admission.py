"""How many requests the server holds, in all and per tenant. Pure counting; refuses, never waits.

vLLM queues what it cannot batch; this bounds that queue before a tokenizer or an adapter is touched.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_server.errors import QueueFullError, TenantQuotaError

RETRY_AFTER_S = 1.0


class Admission:
    """Counts requests between their arrival and their one outcome."""

    def __init__(self, *, requests_max: int, tenant_requests_max: int) -> None:
        self._requests_max = requests_max
        self._tenant_requests_max = tenant_requests_max
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Requests admitted and not yet ended."""
        return self._held.total()

    @contextmanager
    def admit(self, tenant: str) -> Iterator[None]:
        """Hold one place for the length of the block.

        Raises:
            QueueFullError: the server holds `requests_max` already.
            TenantQuotaError: the tenant holds `tenant_requests_max` already.
        """
        if self.held >= self._requests_max:
            raise QueueFullError(
                f"the server holds {self._requests_max} requests already", retry_after_s=RETRY_AFTER_S
            )
        if self._held[tenant] >= self._tenant_requests_max:
            raise TenantQuotaError(
                f"tenant {tenant} holds {self._tenant_requests_max} requests already",
                retry_after_s=RETRY_AFTER_S,
                metadata={"tenant": tenant, "requests_max": str(self._tenant_requests_max)},
            )
        self._held[tenant] += 1
        try:
            yield
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

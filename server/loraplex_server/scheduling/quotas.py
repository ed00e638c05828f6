"""What one tenant may use: requests held, requests per second, tokens per minute. Pure.

Rates are token buckets: a request takes its one from the first when it is accepted, several at once take theirs as soon
as there is one, which may leave it below zero; generated and prompt tokens are
taken from the second as they are known, which may leave it below zero, and nothing more is accepted until it has filled
up again. So a tenant's long-run rate is never above its quota, and a refusal says when the next request will do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraplex_server.errors import TenantQuotaError

TENANTS_MAX: Final = 10_000
"""Most tenants whose buckets are kept; beyond it the one that was idle longest begins with full ones again."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What a tenant may use; 0 means no limit.

    Attributes:
        requests_max: accepted and not ended, at once.
        requests_per_s: on average, with bursts of as many as come within `burst_s`.
        tokens_per_minute: prompt and generated tokens, on average.
        burst_s: seconds of its rate that a tenant may use at once after having used nothing.
    """

    requests_max: int = 0
    requests_per_s: float = 0.0
    tokens_per_minute: float = 0.0
    burst_s: float = 10.0


class _Bucket:
    """Tokens that flow in at a rate up to a size. May be drawn below zero; never refuses by itself."""

    def __init__(self, rate: float, size: float, now_s: float) -> None:
        self._rate, self._size = rate, size
        self._level, self._at_s = size, now_s

    def level(self, now_s: float) -> float:
        self._level = min(self._size, self._level + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        return self._level

    def draw(self, tokens: float, now_s: float) -> None:
        self._level = self.level(now_s) - tokens

    def wait_s(self, wanted: float, now_s: float) -> float:
        """Seconds until `wanted` are there; 0 when they are."""
        return max(0.0, (wanted - self.level(now_s)) / self._rate)


class _Use:
    def __init__(self, quota: Quota, now_s: float) -> None:
        self.quota = quota
        self.held = 0
        self.requests = _bucket(quota.requests_per_s, quota.burst_s, now_s)
        self.tokens = _bucket(quota.tokens_per_minute / 60, quota.burst_s, now_s)


class Quotas:
    """What every tenant uses. Not for several threads at once."""

    def __init__(self, quota_of: Callable[[str], Quota], *, clock: Callable[[], float]) -> None:
        """Begin with nothing used.

        Args:
            quota_of: a tenant's quota; asked for when it comes.
            clock: seconds that never go back.
        """
        self._quota_of = quota_of
        self._clock = clock
        self._uses: OrderedDict[str, _Use] = OrderedDict()

    def accept(self, tenant: str, requests: int = 1) -> None:
        """Count requests as held and take them from the rate; `released` must follow.

        Raises:
            TenantQuotaError: one of the quotas is used up; says which, and when to come again.
        """
        use, now_s = self._use(tenant), self._clock()
        quota = use.quota
        if quota.requests_max and use.held + requests > quota.requests_max:
            what = f"may have {quota.requests_max} requests at once, and would have {use.held + requests}"
            raise _refused(tenant, "requests_max", what, 1.0)
        if use.tokens is not None and (wait_s := use.tokens.wait_s(0.0, now_s)) > 0:
            what = f"has used its {quota.tokens_per_minute:g} tokens per minute"
            raise _refused(tenant, "tokens_per_minute", what, wait_s)
        if use.requests is not None:
            if (wait_s := use.requests.wait_s(1.0, now_s)) > 0:
                what = f"has sent its {quota.requests_per_s:g} requests per second"
                raise _refused(tenant, "requests_per_s", what, wait_s)
            use.requests.draw(requests, now_s)
        use.held += requests

    def used(self, tenant: str, tokens: int) -> None:
        """Count tokens of a held request."""
        use = self._use(tenant)
        if use.tokens is not None:
            use.tokens.draw(tokens, self._clock())

    def released(self, tenant: str, requests: int = 1) -> None:
        """Say that requests which were accepted are held no more."""
        self._uses[tenant].held -= requests

    def held(self, tenant: str) -> int:
        """Requests of a tenant that are held."""
        found = self._uses.get(tenant)
        return found.held if found else 0

    def _use(self, tenant: str) -> _Use:
        found = self._uses.get(tenant)
        if found is None:
            found = self._uses[tenant] = _Use(self._quota_of(tenant), self._clock())
            self._forget_idle()
        self._uses.move_to_end(tenant)
        return found

    def _forget_idle(self) -> None:
        for name in list(self._uses)[: max(0, len(self._uses) - TENANTS_MAX)]:
            if not self._uses[name].held:
                del self._uses[name]


def _bucket(rate: float, burst_s: float, now_s: float) -> _Bucket | None:
    return _Bucket(rate, max(1.0, rate * burst_s), now_s) if rate else None


def _refused(tenant: str, quota: str, what: str, wait_s: float) -> TenantQuotaError:
    return TenantQuotaError(
        f"tenant {tenant} {what}", retry_after_s=wait_s, metadata={"tenant": tenant, "quota": quota}
    )

"""What one tenant may use."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.errors import TenantQuotaError
from loraplex_server.scheduling.quotas import TENANTS_MAX, Quota, Quotas


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def quotas(**quota: float) -> tuple[Quotas, Clock]:
    clock = Clock()
    return Quotas(lambda _tenant: Quota(**quota), clock=clock), clock  # type: ignore[arg-type]


def refused_for(held: Quotas) -> float | None:
    """Ask for one request of tenant a; the seconds to wait when it is refused."""
    try:
        held.accept("a")
    except TenantQuotaError as error:
        return error.retry_after_s
    return None


def test_requests_held_at_once_are_bounded_per_tenant() -> None:
    held, _ = quotas(requests_max=2)
    held.accept("a")
    held.accept("a")
    held.accept("b")
    with pytest.raises(TenantQuotaError) as caught:
        held.accept("a")
    assert caught.value.metadata == {"tenant": "a", "quota": "requests_max"}
    held.released("a")
    held.accept("a")
    assert (held.held("a"), held.held("b"), held.held("c")) == (2, 1, 0)


@given(
    rate=st.floats(0.1, 50),
    burst_s=st.floats(0.1, 20),
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=200),
)
def test_the_rate_is_kept_over_any_time_and_a_refusal_says_when_to_come_again(
    rate: float, burst_s: float, gaps: list[float]
) -> None:
    held, clock = quotas(requests_per_s=rate, burst_s=burst_s)
    for accepted, gap in enumerate(gaps, 1):
        clock.now += gap
        wait_s = refused_for(held)
        if wait_s is not None:
            assert wait_s > 0
            clock.now += wait_s + 1e-6
            assert refused_for(held) is None
        assert accepted <= max(1.0, rate * burst_s) + rate * clock.now + 1e-3


@given(
    rate=st.floats(0.1, 50),
    calls=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 16)), min_size=1, max_size=100),
)
def test_calls_of_several_requests_keep_the_rate_too_but_for_the_last_one(
    rate: float, calls: list[tuple[float, int]]
) -> None:
    held, clock = quotas(requests_per_s=rate, burst_s=1)
    accepted = 0
    for gap, requests in calls:
        clock.now += gap
        with contextlib.suppress(TenantQuotaError):
            held.accept("a", requests)
            accepted += requests
        assert accepted <= max(1.0, rate) + rate * clock.now + 15 + 1e-3, (
            "each begins with one of its own there"
        )


def test_several_requests_at_once_are_held_and_released_as_so_many() -> None:
    held, _ = quotas(requests_max=4)
    held.accept("a", 3)
    with pytest.raises(TenantQuotaError, match="would have 5"):
        held.accept("a", 2)
    held.accept("a", 1)
    held.released("a", 3)
    assert held.held("a") == 1


def test_tokens_are_paid_for_afterwards_and_nothing_is_accepted_until_they_are() -> None:
    held, clock = quotas(tokens_per_minute=600, burst_s=1)
    held.accept("a")
    held.used("a", 110)  # 10 were there, and 10 come per second
    with pytest.raises(TenantQuotaError, match="600 tokens per minute") as caught:
        held.accept("a")
    assert caught.value.retry_after_s == pytest.approx(10)
    held.accept("b")
    clock.now += 10
    held.accept("a")


def test_no_quota_refuses_nothing_and_tenants_that_use_nothing_are_forgotten() -> None:
    held, _ = quotas()
    for number in range(TENANTS_MAX + 100):
        held.accept(f"t{number}")
        held.used(f"t{number}", 10**9)
        held.released(f"t{number}")
    assert len(held._uses) <= TENANTS_MAX

"""Bounds on held requests."""

import pytest

from loraplex_server.admission import Admission
from loraplex_server.errors import QueueFullError, TenantQuotaError


def test_one_tenant_cannot_take_every_place() -> None:
    admission = Admission(requests_max=3, tenant_requests_max=2)
    with admission.admit("acme"), admission.admit("acme"):
        with pytest.raises(TenantQuotaError, match="acme"), admission.admit("acme"):
            pass
        with admission.admit("globex"):
            with pytest.raises(QueueFullError), admission.admit("initech"):
                pass
            assert admission.held == 3
    assert admission.held == 0


def test_a_failing_request_gives_its_place_back() -> None:
    admission = Admission(requests_max=1, tenant_requests_max=1)
    with pytest.raises(ValueError, match="x"), admission.admit("acme"):
        raise ValueError("x")
    with admission.admit("acme"):
        pass

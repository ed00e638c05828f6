"""The table of what callers may do."""

import pytest

from loraplex_protos.v1 import adapters_pb2, generation_pb2
from loraplex_server.identity.principals import (
    LOCAL_ADMIN,
    RIGHTS,
    Action,
    Principal,
    Role,
    is_printable_name,
    may,
    may_call,
    may_see,
)

TENANT = Principal("app", "acme", Role.TENANT)


def methods() -> set[str]:
    """The full names of all methods of our protocols."""
    found = set()
    for file in (adapters_pb2.DESCRIPTOR, generation_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return found


def test_every_method_has_a_row_and_every_row_is_a_method() -> None:
    assert set(RIGHTS) == methods()


def test_a_method_without_a_row_is_refused_to_everybody() -> None:
    for principal in (TENANT, LOCAL_ADMIN):
        assert not may_call(principal, "/loraplex.v1.AdapterService/Later")


def test_a_tenant_generates_and_reads_its_own_and_manages_nothing() -> None:
    assert may_see(TENANT, "acme")
    assert not may_see(TENANT, "globex")
    assert [action for action in Action if may(TENANT, action)] == [Action.GENERATE, Action.READ]
    assert all(may_call(LOCAL_ADMIN, method) for method in methods())
    assert may_see(LOCAL_ADMIN, "globex")


@pytest.mark.parametrize("name", ["", " ", "a b", "a\nb", "a\x1b[31m", "x" * 129, None, 3])
def test_a_name_that_could_forge_a_line_of_the_log_is_none(name: object) -> None:
    assert not is_printable_name(name)

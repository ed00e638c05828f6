"""Callers, and what they may do: one table, deny by default.

A call passes when its method has a row in `RIGHTS` and the caller's role has that right. Which adapters exist for a
caller is another question, answered by `may_see`: what a caller may not see cannot be told from what is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

NAME_CHARS_MAX: Final = 128
"""Longest name of a caller, in characters."""


class Action(StrEnum):
    """What a call does with an adapter."""

    GENERATE = "generate"
    READ = "read"
    MANAGE = "manage"


class Role(StrEnum):
    """What kind of caller a credential stands for."""

    TENANT = "tenant"
    ADMIN = "admin"


RIGHTS: Final[Mapping[str, Action]] = MappingProxyType(
    {
        "/loraplex.v1.GenerationService/Generate": Action.GENERATE,
        "/loraplex.v1.GenerationService/Tokenize": Action.READ,
        "/loraplex.v1.GenerationService/Embed": Action.GENERATE,
        "/loraplex.v1.AdapterService/ListAdapters": Action.READ,
        "/loraplex.v1.AdapterService/GetAdapter": Action.READ,
        "/loraplex.v1.AdapterService/LoadAdapter": Action.GENERATE,
        "/loraplex.v1.AdapterService/UnloadAdapter": Action.MANAGE,
        "/loraplex.v1.AdapterService/PinAdapter": Action.MANAGE,
        "/loraplex.v1.AdapterService/UnpinAdapter": Action.MANAGE,
        "/loraplex.v1.AdapterService/ValidateAdapter": Action.GENERATE,
        "/loraplex.v1.AdapterService/GetRollout": Action.READ,
        "/loraplex.v1.AdapterService/ResumeRollout": Action.MANAGE,
    }
)
"""Full method name -> the right it needs. A method without a row is refused to everybody."""

_ALLOWED: Final[Mapping[Role, frozenset[Action]]] = MappingProxyType(
    {
        Role.TENANT: frozenset({Action.GENERATE, Action.READ}),
        Role.ADMIN: frozenset(Action),
    }
)


@dataclass(frozen=True)
class Principal:
    """A caller whose credential was checked. An admin's `tenant` is only a label."""

    name: str
    tenant: str
    role: Role


LOCAL_ADMIN: Final = Principal(name="local", tenant="local", role=Role.ADMIN)
"""Everybody, on a server that asks for no credential; `config` allows that on loopback only."""


def may_see(principal: Principal, tenant: str) -> bool:
    """Say whether adapters of `tenant` exist at all for this caller."""
    return principal.role is Role.ADMIN or principal.tenant == tenant


def may(principal: Principal, action: Action) -> bool:
    """Say whether this kind of caller may do this on the adapters it sees."""
    return action in _ALLOWED[principal.role]


def may_call(principal: Principal, method: str) -> bool:
    """Say whether this kind of caller may call a method, by its full name."""
    action = RIGHTS.get(method)
    return action is not None and may(principal, action)


def is_printable_name(name: object) -> bool:
    """Say whether a text may name a caller in logs: 1 to NAME_CHARS_MAX printable characters without spaces."""
    return (
        isinstance(name, str) and 0 < len(name) <= NAME_CHARS_MAX and name.isprintable() and " " not in name
    )

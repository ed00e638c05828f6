"""A small evaluator of IAM policies, as far as `deploy/iam` uses the language: an explicit deny wins, else an allow.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
Unknown elements and operators raise, so that a policy cannot say something that is not evaluated.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IAM = Path(__file__).parents[2] / "deploy" / "iam"
VALUES = {
    "bucket": "adapters",
    "prefix": "registry/",
    "account": "123456789012",
    "tenant": "acme",
    "kms_key_arn": "arn:aws:kms:eu-central-1:123456789012:key/acme",
    "kms_admin_role_arn": "arn:aws:iam::123456789012:role/kms-admin",
    "server_role_arn": "arn:aws:iam::123456789012:role/server",
    "admin_role_arn": "arn:aws:iam::123456789012:role/admin",
    "break_glass_role_arn": "arn:aws:iam::123456789012:role/break-glass",
}
_ELEMENTS = {"Sid", "Effect", "Principal", "Action", "Resource", "NotResource", "Condition"}


@dataclass(frozen=True)
class Request:
    """What is asked: action, resource, and the request's context keys (absent ones are absent, not empty)."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def load(name: str, **values: str) -> dict[str, Any]:
    """Read a policy of `deploy/iam` with its placeholders filled in."""
    text = (IAM / f"{name}.json").read_text(encoding="utf-8")
    for key, value in {**VALUES, **values}.items():
        text = text.replace("{{" + key + "}}", value)
    assert "{{" not in text, f"{name} has an unknown placeholder"
    policy: dict[str, Any] = json.loads(text)
    return policy


def decide(request: Request, *policies: Mapping[str, Any]) -> bool:
    """Say whether a principal with these policies (and resource policies) may."""
    effects = [
        statement["Effect"]
        for policy in policies
        for statement in policy["Statement"]
        if _applies(statement, request)
    ]
    assert set(effects) <= {"Allow", "Deny"}
    return "Allow" in effects and "Deny" not in effects


def as_list(value: Any) -> list[str]:
    """Return one text or several as a list."""
    return [value] if isinstance(value, str) else list(value)


def _applies(statement: Mapping[str, Any], request: Request) -> bool:
    assert set(statement) <= _ELEMENTS, set(statement) - _ELEMENTS
    assert ("Resource" in statement) != ("NotResource" in statement)
    if not any(_like(request.action, action, request, fold=True) for action in as_list(statement["Action"])):
        return False
    if "Principal" in statement and not _is_principal(statement["Principal"], request):
        return False
    resources = as_list(statement.get("Resource", statement.get("NotResource")))
    named = any(_like(request.resource, pattern, request) for pattern in resources)
    if named != ("Resource" in statement):
        return False
    return all(
        _holds(operator, key, as_list(values), request)
        for operator, keys in statement.get("Condition", {}).items()
        for key, values in keys.items()
    )


def _is_principal(principal: str | Mapping[str, Any], request: Request) -> bool:
    """Anybody, a role by its ARN, or with `:root` whoever of the account has a policy that allows it as well."""
    if principal == "*":
        return True
    assert isinstance(principal, Mapping)
    assert set(principal) == {"AWS"}
    account = f"arn:aws:iam::{VALUES['account']}:"
    caller = request.context.get("aws:PrincipalArn", "")
    return any(
        caller == named or (named == account + "root" and caller.startswith(account))
        for named in as_list(principal["AWS"])
    )


def _holds(operator: str, key: str, values: list[str], request: Request) -> bool:
    found = request.context.get(key)
    if operator == "Null":
        return (found is None) == (values == ["true"])
    if operator == "ArnNotEquals":
        return found is None or not any(_like(found, value, request) for value in values)
    if found is None:
        return False
    compare: dict[str, Callable[[str], bool]] = {
        "StringEquals": lambda value: _filled(value, request) == found,
        "StringLike": lambda value: _like(found, value, request),
        "Bool": lambda value: value == found,
    }
    return any(compare[operator](value) for value in values)


def _like(text: str, pattern: str, request: Request, *, fold: bool = False) -> bool:
    wanted = _filled(pattern, request)
    if wanted is None:
        return False
    regex = re.escape(wanted).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(regex, text, re.IGNORECASE | re.DOTALL if fold else re.DOTALL) is not None


def _filled(pattern: str, request: Request) -> str | None:
    """Replace policy variables; a statement with one that the request does not have does not apply."""
    for name in re.findall(r"\$\{([^}]+)\}", pattern):
        if name not in request.context:
            return None
        pattern = pattern.replace("${" + name + "}", request.context[name])
    return pattern

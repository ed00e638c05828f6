"""API keys and the table of what callers may do."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_server.auth import LOCAL_ADMIN, Action, Authenticator, Principal, Role, make_key, may, may_see
from loraplex_server.errors import ConfigError, UnauthenticatedError


def authenticator(tmp_path: Path, *entries: str) -> Authenticator:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(entries))
    return Authenticator.from_file(path)


def test_a_made_key_opens_its_tenant_and_nothing_else(tmp_path: Path) -> None:
    key, entry = make_key("acme-app", "acme")
    principal = authenticator(tmp_path, entry).principal(f"Bearer {key}")
    assert principal == Principal("acme-app", "acme", Role.TENANT)
    assert may_see(principal, "acme")
    assert not may_see(principal, "globex")
    assert may(principal, Action.GENERATE)
    assert not may(principal, Action.MANAGE)


def test_the_file_never_holds_the_key_itself() -> None:
    key, entry = make_key("a", "b")
    assert key not in entry
    assert hashlib.sha256(key.encode()).hexdigest() in entry


@pytest.mark.parametrize(
    "credential", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer " + "x" * 600]
)
def test_a_missing_or_unknown_credential_is_refused_without_repeating_it(
    tmp_path: Path, credential: str | None
) -> None:
    _, entry = make_key("a", "b")
    with pytest.raises(UnauthenticatedError) as caught:
        authenticator(tmp_path, entry).principal(credential)
    assert "wrong" not in str(caught.value)
    assert "xxx" not in str(caught.value)


def test_without_keys_the_local_user_is_admin() -> None:
    assert Authenticator(None).principal(None) is LOCAL_ADMIN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys = 3",
        '[[keys]]\nname = "a"',
        '[[keys]]\nname = "a"\ntenant = "t"\nsha256 = "short"',
        f'[[keys]]\nname = "a"\ntenant = "t"\nsha256 = "{"0" * 64}"\nrole = "root"',
        f'[[keys]]\nname = "a"\ntenant = "t"\nsha256 = "{"0" * 64}"\nextra = "x"',
        f'[[keys]]\nname = "a"\ntenant = 3\nsha256 = "{"0" * 64}"',
        (f'[[keys]]\nname = "a"\ntenant = "t"\nsha256 = "{"0" * 64}"\n') * 2,
        "[[keys",
    ],
)
def test_a_damaged_keys_file_refuses_to_load(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        authenticator(tmp_path, text)


def test_the_command_prints_key_and_entry_apart(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "loraplex_server.auth", "ops", "acme", "--admin"],
        capture_output=True,
        text=True,
        check=True,
    )
    principal = authenticator(tmp_path, made.stderr).principal(f"Bearer {made.stdout.strip()}")
    assert principal.role is Role.ADMIN

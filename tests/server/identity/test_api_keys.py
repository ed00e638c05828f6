"""API keys and names of certificates."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_server.config import AuthSettings
from loraplex_server.errors import ConfigError, UnauthenticatedError
from loraplex_server.identity.api_keys import make_key, parse_known
from loraplex_server.identity.authenticator import ALTERNATIVE_NAMES, Authenticator
from loraplex_server.identity.principals import LOCAL_ADMIN, Principal, Role

CERTIFICATE = '[[certificates]]\nname = "batch"\nsan = "spiffe://acme.example/batch"\ntenant = "acme"\n'


def authenticator(tmp_path: Path, *entries: str) -> Authenticator:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(entries))
    return Authenticator.from_settings(AuthSettings(keys=str(path)))


def test_a_made_key_stands_for_its_tenant(tmp_path: Path) -> None:
    key, entry = make_key("acme-app", "acme")
    found = authenticator(tmp_path, entry).principal(f"Bearer {key}", {})
    assert found == Principal("acme-app", "acme", Role.TENANT)


def test_the_file_never_holds_the_key_itself() -> None:
    key, entry = make_key("a", "b")
    assert key not in entry
    assert hashlib.sha256(key.encode()).hexdigest() in entry


@pytest.mark.parametrize(
    "credential",
    [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer wr.on.g", "Bearer " + "x" * 9000],
)
def test_a_missing_or_unknown_credential_is_refused_without_repeating_it(
    tmp_path: Path, credential: str | None
) -> None:
    _, entry = make_key("a", "b")
    with pytest.raises(UnauthenticatedError) as caught:
        authenticator(tmp_path, entry).principal(credential, {})
    assert "wr" not in str(caught.value)
    assert "xxx" not in str(caught.value)


def test_without_any_source_the_local_user_is_admin() -> None:
    assert Authenticator.from_settings(AuthSettings()).principal(None, {}) is LOCAL_ADMIN


def test_a_certificate_stands_for_whom_its_name_is_listed(tmp_path: Path) -> None:
    key, entry = make_key("app", "acme")
    auth = authenticator(tmp_path, CERTIFICATE, entry)
    peer = {ALTERNATIVE_NAMES: [b"other", b"spiffe://acme.example/batch"]}
    assert auth.principal(None, peer) == Principal("batch", "acme", Role.TENANT)
    assert auth.principal(f"Bearer {key}", peer).name == "app"
    for wrong in (
        {},
        {ALTERNATIVE_NAMES: [b"spiffe://acme.example/batch/"]},
        {"x509_common_name": [b"batch"]},
    ):
        with pytest.raises(UnauthenticatedError):
            auth.principal(None, wrong)
    with pytest.raises(UnauthenticatedError):  # a wrong key is not made up for by a good certificate
        auth.principal("Bearer lpx_wrong", peer)


def test_a_certificate_with_names_of_two_callers_is_refused(tmp_path: Path) -> None:
    second = CERTIFICATE.replace("/batch", "/other").replace('"batch"', '"other"')
    auth = authenticator(tmp_path, CERTIFICATE, second)
    names = [b"spiffe://acme.example/batch", b"spiffe://acme.example/other"]
    with pytest.raises(UnauthenticatedError):
        auth.principal(None, {ALTERNATIVE_NAMES: names})


def test_a_changed_file_is_taken_over_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    first, first_entry = make_key("one", "acme")
    second, second_entry = make_key("two", "acme")
    auth, path = authenticator(tmp_path, first_entry), tmp_path / "keys.toml"
    path.write_text(second_entry)
    auth.refresh()
    assert auth.principal(f"Bearer {second}", {}).name == "two"
    with pytest.raises(UnauthenticatedError):
        auth.principal(f"Bearer {first}", {})
    for wrong in ("[[keys", "", "keys = 3"):
        path.write_text(wrong)
        auth.refresh()
        assert auth.principal(f"Bearer {second}", {}).name == "two"
    path.unlink()
    auth.refresh()
    assert auth.principal(f"Bearer {second}", {}).name == "two"
    path.write_text(first_entry)
    auth.refresh()
    assert auth.principal(f"Bearer {first}", {}).name == "one"


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
        f'[[keys]]\nname = "a"\ntenant = "../t"\nsha256 = "{"0" * 64}"',
        f'[[keys]]\nname = "a\\nb"\ntenant = "t"\nsha256 = "{"0" * 64}"',
        (f'[[keys]]\nname = "a"\ntenant = "t"\nsha256 = "{"0" * 64}"\n') * 2,
        CERTIFICATE * 2,
        CERTIFICATE.replace("batch", "b\\u0007", 2),
        "[[keys",
    ],
)
def test_a_damaged_keys_file_refuses_to_load(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        parse_known(text.encode())
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        authenticator(tmp_path, text)


def test_the_command_prints_key_and_entry_apart(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "loraplex_server.identity.api_keys", "ops", "acme", "--admin"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = authenticator(tmp_path, made.stderr).principal(f"Bearer {made.stdout.strip()}", {})
    assert found.role is Role.ADMIN

"""The settings file: every key known, every mistake named."""

from pathlib import Path

import pytest

from loraplex_registry.errors import InvalidReferenceError, SettingsError
from loraplex_registry.settings import (
    Settings,
    config_directory,
    load_settings,
    settings_path,
    state_directory,
)


def write(home: Path, text: str | bytes) -> dict[str, str]:
    environment = {"HOME": str(home)}
    path = settings_path(environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return environment


def test_without_a_file_nothing_is_set(tmp_path: Path) -> None:
    assert load_settings({"HOME": str(tmp_path)}) == Settings()


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    environment = write(tmp_path, 'key = "keys/a.key"\npolicy = "/etc/policy.toml"\nbase = "b"\n')
    found = load_settings(environment)
    place = config_directory(environment)
    assert (found.key, found.policy, found.base) == (
        str(place / "keys/a.key"),
        "/etc/policy.toml",
        str(place / "b"),
    )


def test_a_key_service_is_no_path(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, 'key = "awskms:alias/acme"\n')).key == "awskms:alias/acme"


def test_the_environment_and_the_command_line_come_later(tmp_path: Path) -> None:
    environment = write(tmp_path, 'registry = "file:///a"\n')
    assert load_settings(environment).registry == "file:///a"
    found = load_settings({**environment, "LORAPLEX_REGISTRY": "file:///b"})
    assert found.registry == "file:///b"
    assert found.overridden(registry="file:///c", region=None).registry == "file:///c"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('polici = "x"', "did you mean 'policy'"),
        ('zzz = "x"', "unknown key 'zzz'"),
        ("tenant = 3", "tenant must be a text"),
        ('key = ""', "key must be a text"),
        ("registry = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        ('audit = "maybe"', 'audit must be "on" or "off"'),
        ("[registry]", "registry must be a text"),
    ],
)
def test_a_mistake_is_named(text: str | bytes, named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        load_settings(write(tmp_path, text))


def test_a_tenant_must_be_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidReferenceError):
        load_settings(write(tmp_path, 'tenant = "../x"'))


def test_what_is_missing_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--registry"):
        Settings().require("registry", option="--registry")


def test_directories_follow_the_xdg_specification(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert config_directory({**home, "XDG_CONFIG_HOME": "relative"}) == tmp_path / ".config/loraplex"
    assert config_directory({**home, "XDG_CONFIG_HOME": "/x"}) == Path("/x/loraplex")
    assert state_directory(home) == tmp_path / ".local/state/loraplex"

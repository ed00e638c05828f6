"""Settings: every mistake names its key and the file."""

from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.storage.s3_options import S3Options
from loraplex_server.config import Config, load_config, parse_config, split_address
from loraplex_server.errors import ConfigError


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return load_config(path)


def test_the_smallest_file_names_only_the_model(tmp_path: Path) -> None:
    config = read(tmp_path, '[model]\npath = "org/some-model"\n')
    assert config.model.quantization == "nf4"
    assert config.model.name == "some-model"
    assert config.server.listen.startswith("127.0.0.1:")
    assert config.engine_rank == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[model]\npath = "m"\nquantisation = "nf4"', ["model.quantisation", "quantization"]),
        ('[modle]\npath = "m"', ["[modle]", "model"]),
        ("[model]\n", ["model.path", "required"]),
        ('[model]\npath = "m"\nquantization = "int4"', ["model.quantization", "nf4", "int8"]),
        ('[model]\npath = "m"\ntask = "classify"', ["model.task", "generate", "embed"]),
        ('[model]\npath = "m"\n[server]\nreplay_s = -1', ["server.replay_s", "from 0"]),
        ('[model]\npath = "m"\n[adapters]\nslots = "many"', ["adapters.slots", "int", "str"]),
        ('[model]\npath = "m"\n[adapters]\nslots = true', ["adapters.slots", "int", "bool"]),
        ('[model]\npath = "m"\n[adapters]\nslots = 1', ["adapters.slots", "from 2"]),
        ('[model]\npath = "m"\n[adapters]\nrank_max = 513', ["adapters.rank_max", "512"]),
        ('[model]\npath = "m"\n[server]\nlisten = "127.0.0.1"', ["server.listen", "127.0.0.1:8470"]),
        ('[model]\npath = "m"\n[server]\nlisten = "0.0.0.0:8470"', ["server.listen", "auth.keys"]),
        ('[model]\npath = "m"\n[registry]\nurl = "s3://b/p"', ["registry.policy", "trusted"]),
        ('[model]\npath = "m"\n[limits]\nrequests_max = nan', ["limits.requests_max", "int"]),
        ('[model]\npath = "m"\n[adapters]\nload_timeout_s = nan', ["adapters.load_timeout_s"]),
        ('[model]\npath = "m"\n[registry]\ns3 = 3', ["registry.s3", "section"]),
        (
            '[model]\npath = "m"\n[registry.s3]\ntimeout = 3',
            ["registry.s3", "'timeout'", "checksums, timeout_s"],
        ),
        ('[model]\npath = "m"\n[registry.s3]\ntimeout_s = "3"', ["registry.s3", "timeout_s", "number"]),
        ('[model]\npath = "m"\n[registry.s3]\ntimeout_s = 601', ["registry.s3", "timeout_s", "600"]),
        ('[model]\npath = "m"\n[registry.s3]\nsse = "AES256"', ["registry.s3", "'sse'", "write"]),
        ('[model]\npath = "m"\n[server]\naccess_log = "xml"', ["server.access_log", "json"]),
        ('[model]\npath = "m"\n[tracing]\nendpoint = "collector:4317"', ["tracing.endpoint", "http://"]),
        ('[model]\npath = "m"\n[tracing]\nsample_ratio = 2', ["tracing.sample_ratio", "from 0 to 1"]),
        ('[model]\npath = "m"\n[registry]\nencryption_key = "pgp:x"', ["registry.encryption_key", "awskms"]),
        ("model = 3", ["[model]", "section"]),
        ("[model", ["TOML"]),
    ],
)
def test_a_wrong_setting_names_its_key_and_file(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "server.toml" in message
    assert all(word in message for word in words), message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    document = {
        "model": {"path": "base"},
        "registry": {"url": "s3://b/p", "policy": "policy.toml"},
        "auth": {"keys": "keys.toml"},
    }
    config = parse_config(document, origin=tmp_path / "server.toml")
    assert config.model.path == str(tmp_path / "base")
    assert config.registry.policy == str(tmp_path / "policy.toml")
    assert config.auth.keys == str(tmp_path / "keys.toml")


def test_the_storage_is_spoken_to_as_the_settings_say(tmp_path: Path) -> None:
    text = '[model]\npath = "m"\n[registry.s3]\ntimeout_s = 7\nchecksums = "when_supported"\n'
    assert read(tmp_path, text).registry.s3 == S3Options(timeout_s=7, checksums="when_supported")
    assert read(tmp_path, '[model]\npath = "m"\n').registry.s3 == S3Options()


def test_open_addresses_are_allowed_with_keys(tmp_path: Path) -> None:
    open_to_all = {"model": {"path": "m"}, "server": {"listen": "0.0.0.0:1"}, "auth": {"keys": "k"}}
    with pytest.raises(ConfigError, match=r"tls\.certificate"):
        parse_config(open_to_all, origin=tmp_path / "s.toml")
    for more in (
        {"tls": {"certificate": "c", "key": "k"}},
        {"server": {"listen": "0.0.0.0:1", "plaintext": True}},
    ):
        assert parse_config({**open_to_all, **more}, origin=tmp_path / "s.toml").server.listen == "0.0.0.0:1"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"auth": {"jwks": "j"}}, "auth.issuer"),
        ({"auth": {"issuer": "i"}}, "auth.jwks"),
        ({"tls": {"certificate": "c"}}, "tls.key"),
        ({"tls": {"client_ca": "c"}, "auth": {"keys": "k"}}, "tls.certificate"),
        ({"tls": {"certificate": "c", "key": "k", "client_ca": "c"}}, "names nobody"),
    ],
)
def test_half_an_identity_refuses_to_start(sections: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({"model": {"path": "m"}, **sections}, origin=tmp_path / "s.toml")


@pytest.mark.parametrize("address", ["", "8470", ":8470", "host:", "host:70000", "host:-1", "host:٣"])
def test_an_address_without_a_usable_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        split_address(address)


def test_ipv6_addresses_keep_their_colons() -> None:
    assert split_address("[::1]:8470") == ("::1", 8470)


@pytest.mark.parametrize(("wanted", "slot"), [(1, 1), (2, 8), (9, 16), (17, 32), (257, 320), (512, 512)])
def test_slots_get_the_smallest_rank_vllm_allows(tmp_path: Path, wanted: int, slot: int) -> None:
    config = read(tmp_path, f'[model]\npath = "m"\n[adapters]\nrank_max = {wanted}\n')
    assert config.engine_rank == slot


def test_a_tenants_section_overrides_the_limits_it_names_and_no_others(tmp_path: Path) -> None:
    document = {
        "model": {"path": "m"},
        "limits": {"tenant_requests_max": 9, "tenant_tokens_per_minute": 100},
        "tenants": {"acme": {"weight": 4, "tokens_per_minute": 500}},
    }
    config = parse_config(document, origin=tmp_path / "s.toml")
    acme, other = config.tenant("acme"), config.tenant("globex")
    assert (acme.weight, acme.requests_max, acme.tokens_per_minute) == (4.0, 9, 500.0)
    assert (other.weight, other.requests_max, other.tokens_per_minute) == (1.0, 9, 100.0)
    for wrong in ({"../x": {}}, {"acme": {"weigth": 1}}, {"acme": {"weight": 0}}, {"acme": 3}):
        with pytest.raises(ConfigError, match="tenants"):
            parse_config({**document, "tenants": wrong}, origin=tmp_path / "s.toml")

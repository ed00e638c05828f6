"""Everything in deploy/ parses, and what it names exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from prometheus_client import CollectorRegistry

from loraplex_registry.signing import generate_key
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_server.config import load_config
from loraplex_server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("Dockerfile.*")), ids=lambda path: path.name)
def test_dockerfiles_parse_and_copy_only_what_exists(path: Path) -> None:
    context = DEPLOY if path.name == "Dockerfile.s3" else ROOT
    parsed = DockerfileParser(fileobj=path.open("rb"))
    steps = [(step["instruction"], step["value"]) for step in parsed.structure]
    assert parsed.baseimage
    assert dict(steps).get("USER", "root") not in {"root", "0"}, "must not run as root"
    for instruction, value in steps:
        if instruction == "COPY" and "--from=" not in value:
            *sources, _ = value.split()
            assert all((context / source).exists() for source in sources), value


def test_images_install_every_package_of_the_wheel() -> None:
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = {package.split("/")[0] for package in wheel["packages"]}
    for name in ("Dockerfile.cpu", "Dockerfile.gpu"):
        copied = set(re.findall(r"^COPY (\w+) \w+$", (DEPLOY / name).read_text(), re.MULTILINE))
        assert copied == folders, name


def test_compose_names_files_and_images_that_exist_and_opens_loopback_only() -> None:
    services = COMPOSE["services"]
    assert {"s3", "loraplex", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert ("build" in service) != ("image" in service), name
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file(), name
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name}: pin the image"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to other machines: {port}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./") and source != "./config":
                assert (DEPLOY / source).exists(), volume
            elif not source.startswith("./"):
                assert source in COMPOSE["volumes"], volume


def test_prometheus_scrapes_the_port_the_server_shows_its_metrics_on(tmp_path: Path) -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    target = scrape["static_configs"][0]["targets"][0]
    service, port = target.split(":")
    assert service in COMPOSE["services"]
    config = load_config(DEPLOY / "server.example.toml")
    assert config.server.metrics_listen.endswith(f":{port}")
    assert config.auth.keys
    assert config.registry.url.startswith("s3://adapters/")


def test_the_example_policy_loads_and_denies_by_default(tmp_path: Path) -> None:
    for name in ("acme", "globex"):
        generate_key(tmp_path / f"{name}.key")
    (tmp_path / "policy.toml").write_text((DEPLOY / "policy.example.toml").read_text())
    TrustPolicy.load(tmp_path / "policy.toml")


def test_every_metric_of_the_dashboard_is_one_the_server_has() -> None:
    registry = CollectorRegistry()
    Metrics(tenants_max=1, registry=registry)
    known = {metric.name for metric in registry.collect()}
    dashboard = json.loads((DEPLOY / "grafana/dashboards/loraplex.json").read_text())
    used = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used |= set(re.findall(r"\bloraplex_\w+", target["expr"]))
    assert len(used) > 10
    unknown = {name for name in used if re.sub(r"_(bucket|total|count|sum)$", "", name) not in known}
    assert unknown == set()
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["uid"] == dashboard["panels"][0]["datasource"]["uid"]

"""Options of every test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the long campaigns need; options must be known before their folder is collected."""
    parser.addoption("--seed", default=None, help="seed of random campaigns; printed by every run")
    parser.addoption("--save-figures", default=None, metavar="AREA", help="keep the campaigns' figures")

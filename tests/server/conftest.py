"""Fixtures of the server's tests: a base, a registry in a directory, keys and a policy, all real."""

from pathlib import Path

import pytest

from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Published, Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import open_store
from loraplex_registry.validation.base import BaseModel
from tests.registry.builders import load_base, make_adapter, make_signer

POLICY = """
version = 1
default = "deny"
[[rules]]
scope = "acme/**"
keys = [{ path = "acme.pub" }]
[[rules]]
scope = "globex/**"
keys = [{ path = "globex.pub" }]
"""


class Shop:
    """A registry with two tenants' keys, and a hand for publishing small adapters."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base: BaseModel = load_base(root / "base")
        self.signers: dict[str, Signer] = {tenant: make_signer(root, tenant) for tenant in ("acme", "globex")}
        self.policy = root / "policy.toml"
        self.policy.write_text(POLICY)
        self.url = (root / "registry").as_uri()
        self.registry = Registry(open_store(self.url))
        self.registry.initialise()

    def publish(
        self,
        ref: str,
        *,
        seed: int = 0,
        rank: int = 4,
        tag: str | None = None,
        signer: str | None = None,
        expires: str = "",
    ) -> Published:
        """Make an adapter from a seed, sign it with its tenant's key and publish it."""
        parsed = AdapterRef.parse(ref)
        directory = make_adapter(self.root / f"{parsed.adapter}-{seed}-{rank}", rank=rank, seed=seed)
        key = self.signers[signer or parsed.tenant]
        return self.registry.publish(directory, parsed, key, self.base, tag=tag, expires=expires)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """A fresh registry."""
    return Shop(tmp_path)

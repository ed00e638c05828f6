"""The copies of a record in the tags that point to it."""

import dataclasses
from pathlib import Path

from loraplex_registry.lifecycle.tag_state import find_target, read_tag_state, refresh_copies
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.validation.base import BaseModel


def test_an_older_record_never_replaces_a_newer_copy_in_a_tag(
    local_registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    local_registry.publish(adapter, AdapterRef.parse("acme/orders@prod"), signer, base)
    store, ref = local_registry.store, AdapterRef("acme", "orders")
    target = find_target(store, AdapterRef.parse("acme/orders@1"))
    newer = target.record.revised(attest=({"newer": True},))
    older = target.record
    assert refresh_copies(store, ref, dataclasses.replace(target, record=newer)) == ["prod"]
    assert refresh_copies(store, ref, dataclasses.replace(target, record=older)) == []
    state = read_tag_state(store, ref, "prod")
    assert state is not None
    assert state.tag.record == newer

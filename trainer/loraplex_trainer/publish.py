"""From a finished adapter to a signed version in a registry."""

from pathlib import Path

from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Published, Registry
from loraplex_registry.signing import load_signer
from loraplex_registry.storage.store import open_store
from loraplex_trainer.config import PublishSettings
from loraplex_trainer.recipe import TrainResult


def publish(result: TrainResult, settings: PublishSettings) -> Published:
    """Check, sign and push a trained adapter; the same adapter twice is one version.

    Raises:
        loraplex_registry.errors.RegistryError: the key, the adapter or the storage; `.code` says which.
    """
    passphrase = None
    if settings.passphrase_file:
        passphrase = Path(settings.passphrase_file).read_text(encoding="utf-8").partition("\n")[0]
    signer = load_signer(settings.key, passphrase)
    store = open_store(settings.registry, endpoint_url=settings.endpoint_url or None)
    return Registry(store).publish(
        result.adapter_dir,
        AdapterRef.parse(settings.ref),
        signer,
        result.base,
        tag=settings.tag or None,
    )

"""From a finished adapter to a signed version in a registry, by the same way and settings as `registry push`.

Encryption, the audit log, object lock and all else that the user's `config.toml` demands of a push is demanded here
too: `ConfiguredRegistry.publish` does it for both.
"""

from collections.abc import Mapping

from loraplex_registry.configured import ConfiguredRegistry
from loraplex_registry.errors import CallerError
from loraplex_registry.registry import Published
from loraplex_registry.settings import load_settings
from loraplex_trainer.config import PublishSettings
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.recipe import TrainResult


def destination(settings: PublishSettings, environment: Mapping[str, str]) -> ConfiguredRegistry:
    """Return where to publish: the user's settings of the `registry` command, with `publish.*` before them.

    Contacts nothing and reads no key, so that it can be called before hours of training.

    Raises:
        ConfigError: no registry or key is set, or a setting or `publish.ref` is wrong.
    """
    try:
        given = load_settings(environment).overridden(
            registry=settings.registry,
            key=settings.key,
            endpoint_url=settings.endpoint_url,
            region=settings.region,
            encryption_key=settings.encryption_key,
            audit="" if settings.audit == "settings" else settings.audit,
        )
        given.require("registry", option="publish.registry")
        given.require("key", option="publish.key")
        target = ConfiguredRegistry(settings=given, environment=environment)
        target.ref(settings.ref)
        target.registry()
    except CallerError as error:
        raise ConfigError(f"publish: {error}") from error
    return target


def publish(result: TrainResult, settings: PublishSettings, target: ConfiguredRegistry) -> Published:
    """Check, sign and push a trained adapter; the same adapter twice is one version.

    Args:
        result: of `recipe.train`.
        settings: what to call it, and how to open the key.
        target: from `destination`.

    Raises:
        loraplex_registry.errors.RegistryError: the key, the adapter or the storage; `.code` says which.
    """
    key = target.settings.require("key", option="publish.key")
    signer = target.load_signer(key, passphrase_file=settings.passphrase_file)
    return target.publish(
        result.adapter_dir, target.ref(settings.ref), [signer], result.base, tag=settings.tag or None
    )

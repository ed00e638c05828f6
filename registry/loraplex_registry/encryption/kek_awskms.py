"""A key-encryption key in AWS KMS: it never leaves the service.

The `KeyContext` is the encryption context of every call, so KMS itself refuses to unwrap for another tenant, adapter,
version or push, and a key policy can tie the right to unwrap to the caller's tenant (`deploy/iam/kms-key-policy.json`).
KMS logs the context in clear; it holds no secret.

https://docs.aws.amazon.com/kms/latest/developerguide/encrypt_context.html
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ..errors import (
    DigestMismatchError,
    PolicyRefusedError,
    SettingsError,
    StoreRefusedError,
    StoreUnavailableError,
)
from .key_providers import KeyContext

TRIES_MAX: Final = 3
"""How often a call is tried, by the SDK."""

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 10.0
"""Seconds to wait for a connection, and for an answer."""

TENANT_TAG: Final = "tenant"
"""Tag of a KMS key that names the only tenant it serves."""

_ARN = re.compile(
    r"arn:aws[a-z-]*:kms:(?P<region>[a-z0-9-]{1,32}):[0-9]{12}:(?:key/[A-Za-z0-9-]{1,64}|alias/[A-Za-z0-9/_-]{1,250})"
)
_WRONG = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
_BUSY = frozenset(
    {"ThrottlingException", "DependencyTimeoutException", "KMSInternalException", "KeyUnavailableException"}
)
_T = TypeVar("_T")


class AwsKmsKey:
    """See the module. `arn` names a key or an alias; an alias must not be moved while records name it."""

    def __init__(self, arn: str) -> None:
        match = _ARN.fullmatch(arn)
        if match is None:
            raise SettingsError(
                f"encryption key {arn[:100]!r} is not the ARN of a KMS key; write "
                "awskms:arn:aws:kms:REGION:ACCOUNT:key/ID."
            )
        self._arn = arn
        self._region = match["region"]

    @property
    def uri(self) -> str:
        """`awskms:` and the ARN."""
        return f"awskms:{self._arn}"

    def wrap(self, dek: bytes, context: KeyContext) -> bytes:
        """See `KeyProvider.wrap`. One request."""
        answer = self._call(
            "encrypt",
            lambda client: client.encrypt(
                KeyId=self._arn, Plaintext=dek, EncryptionContext=context.to_pairs()
            ),
        )
        return bytes(answer["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, context: KeyContext) -> bytes:
        """See `KeyProvider.unwrap`. One request. The key is named, so KMS does not look for one in the ciphertext."""
        answer = self._call(
            "decrypt",
            lambda client: client.decrypt(
                KeyId=self._arn, CiphertextBlob=wrapped, EncryptionContext=context.to_pairs()
            ),
            wrong=f"The data key of {context} was not wrapped by {self.uri} for it; the record is damaged or was "
            "tampered with.",
        )
        return bytes(answer["Plaintext"])

    def check_destroyable(self, tenant: str) -> str:
        """See `DestroyableKey.check_destroyable`: the key must carry the tag `tenant` with this tenant's name."""
        answer = self._call("read the tags", lambda client: client.list_resource_tags(KeyId=self._key_arn()))
        tags = {tag["TagKey"]: tag["TagValue"] for tag in answer.get("Tags", [])}
        if tags.get(TENANT_TAG) != tenant:
            raise PolicyRefusedError(
                f"{self.uri} is not tagged {TENANT_TAG}={tenant}, so it may serve others; tag it, or use a key per "
                "tenant."
            )
        return f"schedule the deletion of {self.uri}"

    def destroy(self, tenant: str, *, pending_days: int) -> str:
        """Schedule the key's deletion. From this moment KMS refuses to use it; after `pending_days` it is gone.

        Args:
            tenant: whose key it must be tagged as.
            pending_days: 7 to 30, the bounds of AWS; until then the deletion can be cancelled.
        """
        self.check_destroyable(tenant)
        answer = self._call(
            "delete",
            lambda client: client.schedule_key_deletion(
                KeyId=self._key_arn(), PendingWindowInDays=pending_days
            ),
        )
        gone = f"{answer['DeletionDate']:%Y-%m-%d}" if answer.get("DeletionDate") else f"{pending_days} days"
        return f"scheduled the deletion of {self.uri}; refused from now on, gone on {gone}"

    def _key_arn(self) -> str:
        """Return the key's own ARN: tags and deletion do not accept an alias."""
        if ":alias/" not in self._arn:
            return self._arn
        answer = self._call("describe", lambda client: client.describe_key(KeyId=self._arn))
        return str(answer["KeyMetadata"]["Arn"])

    def _call(self, verb: str, call: Callable[[Any], _T], *, wrong: str | None = None) -> _T:
        """Run one SDK call and turn its errors into ours. No message holds a ciphertext, a key or a credential."""
        from botocore import exceptions as sdk

        try:
            return call(_client(self._region))
        except sdk.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))[:64]
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in _WRONG and wrong is not None:
                raise DigestMismatchError(wrong) from error
            if code in _BUSY or status >= 500:
                raise StoreUnavailableError(f"{self.uri} answered {code} to {verb}; try again.") from error
            raise StoreRefusedError(
                f"{self.uri} refused to {verb} ({code}); check the key's state, its policy and your role."
            ) from error
        except (sdk.HTTPClientError, sdk.ConnectionError) as error:
            raise StoreUnavailableError(
                f"{self.uri} cannot be reached ({type(error).__name__}); check the network and try again."
            ) from error
        except (sdk.BotoCoreError, ValueError) as error:
            raise StoreRefusedError(
                f"{self.uri} cannot be used ({type(error).__name__}); check credentials, profile and region."
            ) from error

    def __repr__(self) -> str:
        return f"AwsKmsKey({self.uri})"


@functools.lru_cache(maxsize=8)
def _client(region: str) -> Any:
    """One client per region and process; clients are safe to share between threads."""
    from botocore.config import Config
    from botocore.session import get_session

    config: Any = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": TRIES_MAX, "mode": "standard"},
    )
    return get_session().create_client("kms", region_name=region, config=config)

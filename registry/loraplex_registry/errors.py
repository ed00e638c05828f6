"""Every error the registry raises on purpose, split by who must act.

```
RegistryError
├── CallerError                    the request or the directory must change
│   ├── InvalidReferenceError      INVALID_ARGUMENT      exit 2
│   ├── SettingsError              INVALID_ARGUMENT      exit 2
│   ├── AdapterNotFoundError       ADAPTER_NOT_FOUND     exit 3
│   ├── ConflictError              CONFLICT              exit 4
│   ├── UnsupportedAdapterError    UNSUPPORTED_ADAPTER   exit 5
│   ├── RankTooLargeError          RANK_TOO_LARGE        exit 5
│   └── BaseMismatchError          BASE_MISMATCH         exit 5
├── TrustError                     do not use the bytes; the publisher or the policy's owner must act
│   ├── SignatureInvalidError      SIGNATURE_INVALID     exit 5
│   ├── DigestMismatchError        DIGEST_MISMATCH       exit 5
│   ├── DamagedError               DIGEST_MISMATCH       exit 8
│   ├── PolicyRefusedError         POLICY_REFUSED        exit 6
│   ├── ExpiredError               EXPIRED               exit 6
│   │   └── StaleRevocationError   EXPIRED               exit 6
│   ├── RevokedError               REVOKED               exit 6
│   └── RollbackError              ROLLBACK              exit 6
└── StoreError                     the storage
    ├── StoreUnavailableError      STORE_UNAVAILABLE     exit 7   retry later
    ├── StoreRefusedError          STORE_UNAVAILABLE     exit 7   the operator must act
    ├── KeyAbsentError             ADAPTER_NOT_FOUND     exit 3   inside the package only
    └── KeyConflictError           CONFLICT              exit 4   inside the package only
```

A message is one sentence naming what was wrong and the next step. It never holds a secret, a credential or the
content of an adapter, so it may be shown to a user and logged.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .format.tags import TagObject


class RegistryError(Exception):
    """Base of all errors here.

    Attributes:
        code: stable machine-readable reason, UPPER_SNAKE.
        retryable: the same call may succeed later without anybody changing anything.
        exit_code: what the `registry` command exits with.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CallerError(RegistryError):
    """The request, the settings or the adapter directory must change."""


class InvalidReferenceError(CallerError):
    """A reference, name, version or registry address that does not follow the grammar."""

    code = "INVALID_ARGUMENT"
    exit_code = 2


class SettingsError(CallerError):
    """A settings file, policy file or key file that is missing, damaged or says something unknown."""

    code = "INVALID_ARGUMENT"
    exit_code = 2


class AdapterNotFoundError(CallerError):
    """No committed version answers to the reference.

    Attributes:
        removed: the tag object that says the tag was removed, unverified; None when that is not the reason.
    """

    code = "ADAPTER_NOT_FOUND"
    exit_code = 3

    def __init__(self, message: str, *, removed: TagObject | None = None) -> None:
        super().__init__(message)
        self.removed = removed


class ConflictError(CallerError):
    """Another writer was first, or the version exists with other content."""

    code = "CONFLICT"
    exit_code = 4


class UnsupportedAdapterError(CallerError):
    """The directory is not a plain LoRA adapter in safetensors within the limits."""

    code = "UNSUPPORTED_ADAPTER"
    exit_code = 5


class RankTooLargeError(CallerError):
    """The adapter's rank is above the limit of the server or the policy."""

    code = "RANK_TOO_LARGE"
    exit_code = 5


class BaseMismatchError(CallerError):
    """The adapter was made for another base model, or its shapes do not fit."""

    code = "BASE_MISMATCH"
    exit_code = 5


class TrustError(RegistryError):
    """The bytes must not be used."""


class SignatureInvalidError(TrustError):
    """No valid signature of an allowed key over exactly this adapter under exactly this name."""

    code = "SIGNATURE_INVALID"
    exit_code = 5


class DigestMismatchError(TrustError):
    """Bytes differ from the signed digest or size."""

    code = "DIGEST_MISMATCH"
    exit_code = 5


class DamagedError(TrustError):
    """A record, a tag or a blob in the store is unreadable or gone although it was committed."""

    code = "DIGEST_MISMATCH"
    exit_code = 8


class PolicyRefusedError(TrustError):
    """The trust policy does not allow this adapter."""

    code = "POLICY_REFUSED"
    exit_code = 6


class ExpiredError(TrustError):
    """A key, a certificate or a tag is outside its dates, or the clock is."""

    code = "EXPIRED"
    exit_code = 6


class StaleRevocationError(ExpiredError):
    """The policy demands a revocation list, and there is none or it is too old."""


class RevokedError(TrustError):
    """The version or a key that signed for it is on the tenant's revocation list."""

    code = "REVOKED"
    exit_code = 6


class RollbackError(TrustError):
    """A tag or a revocation list is older than, or contradicts, one that was seen before."""

    code = "ROLLBACK"
    exit_code = 6


class StoreError(RegistryError):
    """The storage behind the registry."""

    exit_code = 7


class StoreUnavailableError(StoreError):
    """The storage cannot be reached or answers with a fault of its own; try again later.

    Attributes:
        ambiguous: a write may have taken effect although no answer came. The writer must read back, never clean up.
    """

    code = "STORE_UNAVAILABLE"
    retryable = True

    def __init__(self, message: str, *, ambiguous: bool = False) -> None:
        super().__init__(message)
        self.ambiguous = ambiguous


class StoreRefusedError(StoreError):
    """The storage answered and said no: credentials, permission, a missing bucket."""

    code = "STORE_UNAVAILABLE"


class KeyAbsentError(StoreError):
    """No object under this key. Raised by stores; the registry turns it into a sentence about an adapter."""

    code = "ADAPTER_NOT_FOUND"
    exit_code = 3


class KeyConflictError(StoreError):
    """A conditional write found another state. Raised by stores; the registry decides what it means."""

    code = "CONFLICT"
    exit_code = 4


def what_to_do(error: OSError) -> str:
    """Return the next step after a failed write, by the system's error number: the end of a message's sentence."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "make room there and try again"
    if error.errno == errno.EROFS:
        return "it is mounted read-only: name another place, or mount it for writing"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "name a place that this user may write to"
    return "look at the disk and try again"

"""How an S3 store talks to its bucket: encryption at rest, object lock, checksums and patience, as one value.

Importing this module needs no AWS SDK, so that settings can be read and checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ..errors import SettingsError

CHECKSUM_MODES: Final = ("when_required", "when_supported")
LOCK_MODES: Final = ("GOVERNANCE", "COMPLIANCE")
SSE_MODES: Final = ("AES256", "aws:kms")

LOCK_DAYS_MAX: Final = 36_500
"""Longest retention, in days (100 years, what S3 accepts)."""

TIMEOUT_S_MAX: Final = 600.0
"""Longest silence that may be configured, in seconds."""


@dataclass(frozen=True, slots=True)
class S3Options:
    """Options of an S3 store. The defaults work with AWS and with every look-alike that has conditional writes.

    Attributes:
        checksums: `when_required` or `when_supported`: whether the SDK adds checksums of its own to requests. The
            SHA-256 that the storage verifies on arrival is always sent; the SDK's additions break some look-alikes
            (boto3#4392).
        timeout_s: longest silence of the storage within one request, in seconds, above 0 and at most 600.
        sse: encryption at rest asked for with every write: `AES256` (SSE-S3), `aws:kms` (SSE-KMS), or None for the
            bucket's default. With SSE-KMS etags are no MD5; nothing here treats them as one.
        sse_kms_key_id: key id or ARN for `aws:kms`; None uses the account's AWS managed key. Readers then need
            `kms:Decrypt` on it, writers `kms:GenerateDataKey`.
        lock_mode: `GOVERNANCE` or `COMPLIANCE`: every object version written is under object lock, so that nobody
            (COMPLIANCE) or nobody without a special permission (GOVERNANCE) can remove or replace that version before
            its time. The bucket must have been made with object lock, which implies versioning. Replacing a tag
            adds a version and still works; deleting adds a delete marker, and the bytes stay until the time is over.
        lock_days: retention in days, 1..36500, counted from each write; goes with `lock_mode`.
    """

    checksums: Literal["when_required", "when_supported"] = "when_required"
    timeout_s: float = 30.0
    sse: Literal["AES256", "aws:kms"] | None = None
    sse_kms_key_id: str | None = None
    lock_mode: Literal["GOVERNANCE", "COMPLIANCE"] | None = None
    lock_days: int | None = None

    def __post_init__(self) -> None:
        """Check that the options fit together.

        Raises:
            SettingsError: an unknown value, or one that is missing its partner.
        """
        _one_of("checksums", self.checksums, CHECKSUM_MODES)
        if self.sse is not None:
            _one_of("sse", self.sse, SSE_MODES)
        if self.lock_mode is not None:
            _one_of("lock_mode", self.lock_mode, LOCK_MODES)
        if not 0 < self.timeout_s <= TIMEOUT_S_MAX:
            raise SettingsError(f"timeout_s {self.timeout_s} must be above 0 and at most {TIMEOUT_S_MAX:g}.")
        if self.sse_kms_key_id is not None and self.sse != "aws:kms":
            raise SettingsError("sse_kms_key_id needs sse = aws:kms; set both or none.")
        if (self.lock_mode is None) != (self.lock_days is None):
            raise SettingsError("Object lock needs lock_mode and lock_days; set both or none.")
        if self.lock_days is not None and not 1 <= self.lock_days <= LOCK_DAYS_MAX:
            raise SettingsError(f"lock_days {self.lock_days} must be between 1 and {LOCK_DAYS_MAX}.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingsError(f"{name} {value!r} is unknown; use {' or '.join(known)}.")

"""How an S3 store talks to its bucket: encryption at rest, object lock, checksums and patience, as one value.

Settings files and the environment name the options as the attributes of `S3Options` do, everywhere. A name that is
not known is refused together with those that are: a misspelt `lock_days` must not leave a bucket unlocked.

Importing this module needs no AWS SDK, so that settings can be read and checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from ..errors import SettingsError

CHECKSUM_MODES: Final = ("when_required", "when_supported")
LOCK_MODES: Final = ("GOVERNANCE", "COMPLIANCE")
SSE_MODES: Final = ("AES256", "aws:kms")

LOCK_DAYS_MAX: Final = 36_500
"""Longest retention, in days (100 years, what S3 accepts)."""

TIMEOUT_S_MAX: Final = 600.0
"""Longest silence that may be configured, in seconds."""

ENVIRONMENT_PREFIX: Final = "LORAPLEX_S3_"
"""With an option's name in capitals, as `LORAPLEX_S3_SSE`, a variable that comes before the settings file."""

READING: Final = ("checksums", "timeout_s")
"""The options that matter to a program that only reads."""


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


OPTIONS: Final = tuple(item.name for item in fields(S3Options))
"""The names of all options."""

_NUMBERS: Final[dict[str, type[int] | type[float]]] = {"timeout_s": float, "lock_days": int}


def read_options(table: Mapping[str, Any], *, where: str, known: Sequence[str] = OPTIONS) -> S3Options:
    """Return the options of a section of a settings file.

    Args:
        table: names and values; the numbers are `timeout_s` and `lock_days`, the rest are texts.
        where: the file and the section, for messages.
        known: the names that may be there.

    Raises:
        SettingsError: an unknown name, a value of the wrong type or out of range, or options that do not fit together.
    """
    for name, value in table.items():
        if name not in known:
            beside = " is for programs that write;" if name in OPTIONS else " is unknown;"
            raise SettingsError(f"{where}: {name[:80]!r}{beside} known here are {', '.join(known)}.")
        kinds: tuple[type, ...] = (_NUMBERS[name], int) if name in _NUMBERS else (str,)
        if type(value) not in kinds or value == "":
            what = "a whole number" if name == "lock_days" else "a number" if name in _NUMBERS else "a text"
            raise SettingsError(f"{where}: {name} must be {what}, not {value!r}.")
    try:
        return S3Options(**table)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error.message}") from error


def environment_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the options that the environment sets, as a table; an empty variable counts as not set.

    Raises:
        SettingsError: a variable that begins like an option but names none, or a number that is none.
    """
    table: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or not text:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in OPTIONS:
            known = ", ".join(ENVIRONMENT_PREFIX + option.upper() for option in OPTIONS)
            raise SettingsError(f"The variable {variable[:80]} is unknown; known are {known}.")
        try:
            table[name] = _NUMBERS[name](text) if name in _NUMBERS else text
        except ValueError:
            raise SettingsError(f"The variable {variable} must be a number, not {text[:80]!r}.") from None
    return table


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingsError(f"{name} {value!r} is unknown; use {' or '.join(known)}.")

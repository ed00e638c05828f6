"""Times in signed statements: UTC to the second, `2026-01-31T09:00:00Z`, in this one spelling."""

from __future__ import annotations

import datetime as dt
import re

from .canonical import StrictJsonError

_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def written(moment: dt.datetime) -> str:
    """Return a time, which has a zone, as statements carry it; fractions of a second are cut off."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_moment(text: object) -> dt.datetime:
    """Return the time written in a statement.

    Raises:
        StrictJsonError: not of the one spelling, or no such time.
    """
    if not isinstance(text, str) or not _MOMENT.fullmatch(text):
        raise StrictJsonError("a time is out of shape")
    try:
        return dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise StrictJsonError("a time is out of shape") from error

"""Verifier: resolve and verify with everything a policy can ask for kept up to date. What servers and commands use.

```
verifier = Verifier(registry, policy, marks=FileMarks(directory))
verified  = verifier.verify(AdapterRef.parse("acme/orders@prod"), base_digest=base.digest)
```

- A tenant's revocation list is fetched when one of the policy's rules names revokers, and asked for again after
  `refresh_s` seconds at the earliest: one conditional request without a body while nothing changed.
- While the storage does not answer, the list that was fetched last goes on to count; its age is judged by the policy's
  `revocation.max_age`, so an outage is survived for exactly as long as the policy says.
- What a reference meant before is handed to `resolve` again, which costs one conditional request while that has not
  changed; `decide` then judges it by the time, the list and the marks of now.
- A tag that was removed is remembered as such, so that the statement before cannot be put back unseen.

One object may be used by many threads.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ..errors import AdapterNotFoundError, StoreUnavailableError
from ..format.moments import parse_moment
from ..format.record import CommittedRecord
from ..refs import AdapterRef
from ..registry import Registry, Resolved, utc_now
from ..signing import bundle_identity
from .marks import MemoryMarks
from .policy import TrustPolicy
from .revocations import RevocationObject
from .statements import require_unrevoked, verify_tag_move
from .steps import Trace
from .verdict import VerifiedManifest, verify

REFRESH_S: Final = 60.0
"""Seconds after which a revocation list is asked for again."""

TENANTS_MAX: Final = 10_000
"""Most tenants whose list is kept."""


class Verifier:
    """See the module.

    Args:
        registry: where adapters are.
        policy: the trust policy.
        marks: what was seen before; None remembers nothing, and an older tag that has not expired is believed.
        refresh_s: seconds after which a revocation list is asked for again; 0 asks every time.
        clock: monotonic seconds.
        now: the time of day, with its zone.
        as_of: an earlier time by which all but the clock and the revocation list is judged; see `verdict.verify`.
    """

    def __init__(
        self,
        registry: Registry,
        policy: TrustPolicy,
        *,
        marks: MemoryMarks | None = None,
        refresh_s: float = REFRESH_S,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], dt.datetime] = utc_now,
        as_of: dt.datetime | None = None,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._marks = marks
        self._refresh_s = refresh_s
        self._clock = clock
        self._now = now
        self._as_of = as_of
        self._lock = threading.Lock()
        self._lists: OrderedDict[str, tuple[float, RevocationObject | None]] = OrderedDict()

    def verify(
        self, ref: AdapterRef, *, base_digest: str | None = None, trace: Trace | None = None
    ) -> VerifiedManifest:
        """Resolve a reference and decide whether what was found may be used.

        Raises:
            AdapterNotFoundError: nothing answers to it.
            TrustError, RankTooLargeError, BaseMismatchError: see `trust.verify`.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        return self.decide(self.resolve(ref), base_digest=base_digest, trace=trace)

    def resolve(self, ref: AdapterRef, previous: Resolved | None = None) -> Resolved:
        """Look up what a reference means now, as `Registry.resolve`; a removal is remembered. `decide` comes next.

        Raises:
            AdapterNotFoundError: nothing answers to it.
            TrustError: what says that it was removed must not be believed.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        try:
            return self._registry.resolve(ref, previous)
        except AdapterNotFoundError as error:
            if error.removed is not None:
                self._see_removal(ref, error)
            raise

    def decide(
        self, resolved: Resolved, *, base_digest: str | None = None, trace: Trace | None = None
    ) -> VerifiedManifest:
        """Decide about what was resolved before, or again about what was verified before: `Resolved` of its record.

        Raises:
            As `verify`, without AdapterNotFoundError.
        """
        return verify(
            resolved.ref,
            version=resolved.version,
            record=resolved.record,
            tag=resolved.tag,
            policy=self._policy,
            now=self._now(),
            base_digest=base_digest,
            revocations=self.revocations(resolved.ref.tenant),
            marks=self._marks,
            trace=trace,
            as_of=self._as_of,
        )

    def require_unrevoked(self, ref: AdapterRef, record: CommittedRecord) -> None:
        """Refuse a version, as read from the store, that must not get a tag: see `statements.require_unrevoked`.

        Raises:
            RevokedError, RollbackError, SignatureInvalidError, ExpiredError: it is revoked, or nobody knows.
            DamagedError, StoreUnavailableError, StoreRefusedError: the list cannot be read.
        """
        created = parse_moment(record.manifest_unverified().created)
        self._require_unrevoked(ref, record.digest, bundle_identity(record.bundle).keyid, created)

    def require_key_unrevoked(self, ref: AdapterRef, keyid: str) -> None:
        """Refuse a key for an adapter when the tenant's list revokes what it signs now.

        Raises:
            As `require_unrevoked`.
        """
        self._require_unrevoked(AdapterRef(ref.tenant, ref.adapter), None, keyid, self._now())

    def _require_unrevoked(
        self, ref: AdapterRef, digest: str | None, keyid: str, signed_at: dt.datetime
    ) -> None:
        require_unrevoked(
            ref,
            digest,
            keyid,
            signed_at,
            policy=self._policy,
            now=self._now(),
            revocations=self.revocations(ref.tenant),
            marks=self._marks,
        )

    def revocations(self, tenant: str) -> RevocationObject | None:
        """Return the tenant's revocation list, unverified and at most `refresh_s` old; None without one.

        Raises:
            DamagedError: it is unreadable.
            StoreUnavailableError, StoreRefusedError: the storage, while no list was fetched before.
        """
        if not any(rule.revokers for rule in self._policy.rules_of(tenant)):
            return None
        with self._lock:
            asked_s, known = self._lists.get(tenant, (None, None))
        if asked_s is not None and self._clock() - asked_s < self._refresh_s:
            return known
        asked_s = self._clock()
        try:
            found = self._registry.revocations(tenant, known)
        except StoreUnavailableError:
            if known is None:
                raise
            return known
        with self._lock:
            self._lists[tenant] = (asked_s, found)
            self._lists.move_to_end(tenant)
            while len(self._lists) > TENANTS_MAX:
                self._lists.popitem(last=False)
        return found

    def _see_removal(self, ref: AdapterRef, error: AdapterNotFoundError) -> None:
        assert error.removed is not None
        verify_tag_move(
            ref,
            error.removed,
            policy=self._policy,
            now=self._now(),
            revocations=self.revocations(ref.tenant),
            marks=self._marks,
        )

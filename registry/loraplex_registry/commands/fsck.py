"""`registry fsck`: check that everything published can be read, and mend what cannot.

Exit code 8 when there is damage. `--deep` reads every byte. `--repair` finishes what died half-way; with `--from` it
also stores damaged or missing files again, from a directory as `registry pull` writes it, or from another registry.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..configured import open_configured
from ..encryption.key_providers import KeyRing
from ..errors import InvalidReferenceError, RegistryError, SettingsError
from ..format.manifest import MANIFEST_BYTES_MAX, Manifest
from ..lifecycle import repair
from ..lifecycle.content import Sealer
from ..lifecycle.findings import Finding, Report
from ..lifecycle.fsck import check
from ..lifecycle.fsck_adapter import Depth, Opener, opener_of
from ..refs import AdapterRef, parse_version
from ..registry import utc_now
from ..storage.store import Store
from ..validation.weights import MANIFEST_NAME, read_small
from .session import Listing, Session

if TYPE_CHECKING:
    from ..lifecycle.judging import PolicyJudge

_MENDABLE = frozenset({"blob-missing", "blob-size", "blob-content"})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("scope", metavar="TENANT[/ADAPTER]", nargs="?", help="default: everything")
    parser.add_argument("--deep", action="store_true", help="read and hash every blob")
    parser.add_argument(
        "--signatures",
        action="store_true",
        help="judge versions, tags and revocation lists by the trust policy too",
    )
    parser.add_argument("--repair", action="store_true", help="finish what died half-way")
    parser.add_argument(
        "--from", metavar="DIR|REGISTRY", dest="source", help="with --repair: a good copy of what is damaged"
    )


@dataclass
class _Checked(Listing):
    """A listing of findings; exit code 8 when there is damage."""

    damaged: bool = False

    def write(self, out: TextIO, *, form: str) -> int:
        """See `Listing.write`."""
        return max(super().write(out, form=form), 8 if self.damaged else 0)


def run(session: Session) -> Listing:
    """Check, repair, and check again."""
    given, store = session.arguments, session.store()
    if given.source and not given.repair:
        raise SettingsError("--from says where to repair from; give --repair too.")
    judge = _judge(session) if given.signatures or (given.repair and given.source) else None
    depth = Depth(
        utc_now(),
        deep=given.deep,
        opener=_opener(session),
        judge=judge.version if judge is not None and given.signatures else None,
        judge_tag=judge.tag if judge is not None and given.signatures else None,
        judge_list=judge.revocations if judge is not None and given.signatures else None,
    )
    tenant, ref = _scope(session)
    report = check(store, depth, tenant=tenant, ref=ref)
    done: list[str] = []
    if given.repair and report.findings:
        done = _repair(session, store, report, judge)
        report = check(store, depth, tenant=tenant, ref=ref)
    value = report.to_value()
    return _Checked(
        {name: value[name] for name in ("damaged", "severities", "counts")} | {"repaired": done},
        "findings",
        value["findings"],
        _line,
        headings="\n".join(done),
        last="" if report.findings else "\n".join([*done, _summary(report)]),
        damaged=report.damaged,
    )


def _scope(session: Session) -> tuple[str | None, AdapterRef | None]:
    scope = session.arguments.scope
    if scope is None or "/" not in scope:
        return scope, None
    ref = session.ref(scope)
    if str(ref) != ref.name:
        raise InvalidReferenceError(f"{ref} names too much; write {ref.name}.")
    return None, ref


def _summary(report: Report) -> str:
    counts = report.counts
    unread = counts.get("not_decrypted", 0)
    return (
        f"no damage in {counts.get('adapters', 0)} adapters, {counts.get('versions', 0)} versions, "
        f"{counts.get('tags', 0)} tags, {counts.get('blobs', 0)} blobs "
        f"({counts.get('orphan_blobs', 0)} of them for `registry gc`)"
    ) + (f"; {unread} encrypted files were not read, set encryption_key" if unread else "")


def _line(finding: dict[str, Any]) -> str:
    advice = f"  [{finding['advice']}]" if finding["advice"] else ""
    refusal = f"{finding['refusal']}: " if finding["refusal"] else ""
    return f"{finding['severity']:<8} {finding['code']:<22} {finding['key']}  {refusal}{finding['reason']}{advice}"


def _opener(session: Session) -> Opener | None:
    """Return what decrypts with the keys that are set, None when none is."""
    ring = KeyRing.parse(session.settings.encryption_key)
    return opener_of(ring) if ring else None


def _sealer(session: Session) -> Sealer | None:
    """Return what encrypts with the key that is set, None when none is."""
    ring = KeyRing.parse(session.settings.encryption_key)
    if not ring:
        return None
    from ..encryption.data_keys import RingSealer

    return RingSealer(ring)


def _judge(session: Session) -> PolicyJudge:
    from ..lifecycle.judging import PolicyJudge

    registry = session.registry()
    return PolicyJudge(registry, session.policy(), marks=session.marks(registry))


def _repair(session: Session, store: Store, report: Report, judge: PolicyJudge | None) -> list[str]:
    """Do what can be done and say it; what cannot be done stays a finding."""
    done = repair.finish(store, report.findings, by="fsck --repair", now=utc_now())
    _settle_tags(session, store, report, done)
    if session.arguments.source is None or judge is None:
        return done
    source = session.arguments.source
    directory = Path(source) if (Path(source) / MANIFEST_NAME).is_file() else None
    other = None if directory is not None else open_configured(session.settings, source)
    for ref in _refs(report.of("record-unreadable")):
        if other is not None:
            restore = functools.partial(repair.restore_record, store, ref, other, judge.version)
            _try(session, done, ref, restore, "its record was restored")
    for ref in _refs([finding for finding in report.findings if finding.code in _MENDABLE]):
        good = _good_copy(directory, other, ref, _opener(session))
        if good is not None:
            mend = functools.partial(repair.mend_version, store, ref, good, sealer=_sealer(session))
            _try(session, done, ref, mend, "its files were stored again")
    return done


def _settle_tags(session: Session, store: Store, report: Report, done: list[str]) -> None:
    """Put back the tags whose mover died after their version was deleted; needs a key and a policy that believes it."""
    # One that may have been put back by somebody is not signed on top of.
    doubted = {finding.key for code in ("tag-rolled-back", "tag-behind-log") for finding in report.of(code)}
    dangling = [
        finding
        for finding in report.of("tag-dangling")
        if finding.severity == "warning" and finding.key not in doubted
    ]
    if not dangling or not session.settings.policy or not session.settings.key:
        return
    from ..lifecycle.settling import SETTLED, settle_tag

    judge, signer = _judge(session), session.signer()
    for finding in dangling:
        ref = repair.ref_of(finding.key)
        settle = functools.partial(
            settle_tag,
            store,
            ref,
            signer,
            now=utc_now(),
            judge_statement=judge.statement,
            judge_version=judge.version,
        )
        if _signs_alone(session, ref, signer.keyid):
            _try(session, done, ref, settle, SETTLED)
        else:
            done.append(f"{ref}: its taggers must move it; this key alone is not enough")


def _signs_alone(session: Session, ref: AdapterRef, keyid: str) -> bool:
    assert ref.tag is not None
    needed = session.policy().rule_for(ref.tenant, ref.adapter).tag_rule(ref.tag)
    return needed.threshold == 1 and keyid in {item.key.keyid for item in needed.taggers or ()}


def _try(session: Session, done: list[str], ref: AdapterRef, work: Callable[[], object], what: str) -> None:
    """Mend one version, record it and say so; what cannot be mended is said too, and the rest goes on."""
    try:
        if not work():
            return
        if session.settings.audit == "on":
            session.record("repair", str(ref), session.signer())
        done.append(f"{ref}: {what}")
    except RegistryError as error:
        if error.retryable:
            raise
        done.append(f"{ref}: {error.message}")


def _good_copy(
    directory: Path | None, other: Store | None, ref: AdapterRef, opener: Opener | None
) -> repair.GoodCopy | None:
    """Return the good copy of a version; a directory is one of the version in its manifest alone."""
    if directory is not None:
        manifest = Manifest.from_bytes(read_small(directory / MANIFEST_NAME, limit_bytes=MANIFEST_BYTES_MAX))
        place = AdapterRef(manifest.tenant, manifest.adapter, version=manifest.version)
        return repair.from_directory(directory) if place == ref else None
    return None if other is None else repair.from_registry(other, ref, opener=opener)


def _refs(findings: list[Finding]) -> list[AdapterRef]:
    """Return the versions that findings about records and blobs are about, each once."""
    refs: dict[str, AdapterRef] = {}
    for finding in findings:
        _, tenant, _, adapter, _, name, *_ = finding.key.split("/")
        version = name.removesuffix(".json").partition("~")[0]
        ref = AdapterRef(tenant, adapter, version=parse_version(version))
        refs[str(ref)] = ref
    return list(refs.values())

"""The gRPC port encrypted: who is let in, who is known by a certificate, and certificates renewed while it runs."""

import datetime as dt
import ipaddress
import os
import socket
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from loraplex_client import Tls, UnauthenticatedError, UnavailableError
from loraplex_server.config import TlsSettings
from loraplex_server.errors import ConfigError
from loraplex_server.identity.api_keys import make_key
from loraplex_server.ports.tls import server_credentials
from tests.registry.pki import DAY, Authority, Issued, issue
from tests.server.conftest import Shop
from tests.server.rig import FOUR, Rig, running

NOW = dt.datetime.now(dt.UTC)
CLIENT = "spiffe://acme.example/batch"
CERTIFICATES = f'[[certificates]]\nname = "batch"\nsan = "{CLIENT}"\ntenant = "acme"\n'


def server_leaf(authority: Authority) -> Issued:
    """A certificate for 127.0.0.1."""
    names = (x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost"))
    usage = (ExtendedKeyUsageOID.SERVER_AUTH,)
    return issue("server", authority.root, start=NOW - DAY, end=NOW + DAY, san=names, usage=usage)


def client_leaf(authority: Authority, name: str = CLIENT) -> Issued:
    """A certificate that carries a client's name."""
    names = (x509.UniformResourceIdentifier(name),)
    usage = (ExtendedKeyUsageOID.CLIENT_AUTH,)
    return issue("client", authority.root, start=NOW - DAY, end=NOW + DAY, san=names, usage=usage)


def files(root: Path, authority: Authority) -> dict[str, str]:
    """Write the server's files; returns its [tls] settings."""
    certificate, key = server_leaf(authority).write(root, "server")
    authority.root.write(root, "ca")
    return {"certificate": str(certificate), "key": str(key)}


def presented(rig: Rig) -> bytes:
    """The certificate that a new connection is shown, in DER."""
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", rig.app.port), timeout=5) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        found = wrapped.getpeercert(binary_form=True)
        assert found is not None
        return found


async def test_an_encrypted_port_answers_those_who_believe_its_issuer_and_nobody_else(shop: Shop) -> None:
    tls = files(shop.root, Authority.make(NOW))
    Authority.make(NOW, name="Evil").root.write(shop.root, "evil")
    key, entry = make_key("app", "acme")
    async with running(shop, keys=entry, tls=tls) as rig:
        async with rig.client(key, tls=Tls(ca=str(shop.root / "ca.pem"))) as client:
            assert len((await client.generate("x", sampling=FOUR)).token_ids) == 4
        async with rig.client("wrong", tls=Tls(ca=str(shop.root / "ca.pem"))) as client:
            with pytest.raises(UnauthenticatedError):
                await client.generate("x", sampling=FOUR)
        for refused in (None, Tls(), Tls(ca=str(shop.root / "evil.pem"))):
            async with rig.client(key, tls=refused) as client:
                with pytest.raises(UnavailableError):
                    await client.generate("x", sampling=FOUR, timeout_s=5)


async def test_a_client_certificate_is_demanded_and_names_the_caller(shop: Shop) -> None:
    shop.publish("acme/orders")
    shop.publish("globex/tickets")
    authority, evil = Authority.make(NOW), Authority.make(NOW, name="Evil")
    tls = {**files(shop.root, authority), "client_ca": str(shop.root / "ca.pem")}
    ca = str(shop.root / "ca.pem")

    def mine(leaf: Issued, name: str) -> Tls:
        certificate, key = leaf.write(shop.root, name)
        return Tls(ca=ca, certificate=str(certificate), key=str(key))

    async with running(shop, keys=CERTIFICATES, tls=tls) as rig:
        async with rig.client(tls=mine(client_leaf(authority), "batch")) as client:
            done = await client.generate("x", adapter="acme/orders", sampling=FOUR)
            assert done.header.adapter.startswith("acme/orders@")
            assert [adapter.tenant async for adapter in client.list_adapters()] == ["acme"]
        async with rig.client(tls=mine(client_leaf(authority, "spiffe://acme.example/x"), "other")) as client:
            with pytest.raises(UnauthenticatedError):
                await client.generate("x", sampling=FOUR)
        for refused in (Tls(ca=ca), mine(client_leaf(evil), "evil")):
            async with rig.client(tls=refused) as client:
                with pytest.raises(UnavailableError):
                    await client.generate("x", sampling=FOUR, timeout_s=5)


async def test_a_renewed_certificate_is_shown_to_the_next_connection(shop: Shop) -> None:
    authority = Authority.make(NOW)
    tls = files(shop.root, authority)
    key, entry = make_key("app", "acme")
    ca = Tls(ca=str(shop.root / "ca.pem"))
    async with running(shop, keys=entry, tls=tls) as rig, rig.client(key, tls=ca) as client:
        await client.generate("x", sampling=FOUR)
        before = presented(rig)
        renewed = server_leaf(authority)
        new = [path.rename(path.with_suffix(".new" + path.suffix)) for path in renewed.write(shop.root, "n")]
        os.replace(new[0], tls["certificate"])  # half of the renewal: the pair does not match
        assert presented(rig) == before
        os.replace(new[1], tls["key"])
        assert presented(rig) == renewed.certificate.public_bytes(Encoding.DER) != before
        await client.generate("x", sampling=FOUR)  # the connection that was there goes on


def test_files_that_do_not_belong_together_refuse_to_start(tmp_path: Path) -> None:
    authority = Authority.make(NOW)
    good = TlsSettings(**files(tmp_path, authority))
    server_credentials(good)
    (tmp_path / "text").write_text("no PEM")
    wrong = [
        {"key": str(tmp_path / "ca.key")},
        {"key": str(tmp_path / "text")},
        {"certificate": str(tmp_path / "text")},
        {"certificate": str(tmp_path / "absent")},
        {"client_ca": str(tmp_path / "absent")},
    ]
    for change in wrong:
        with pytest.raises(ConfigError):
            server_credentials(TlsSettings(**{**files(tmp_path, authority), **change}))

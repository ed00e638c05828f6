"""Encryption of the gRPC and the HTTP port: certificates that may be renewed while the server runs.

Every handshake uses the files as they are then. One that has become unreadable, or a key that does not belong to the
certificate, leaves the last good pair in force and is logged. With a client CA every client must bring a certificate
that one of its issuers signed; what names it carries is told by `identity.authenticator`.
"""

import logging
import ssl
import threading
from pathlib import Path
from typing import Any, Final

import grpc

from loraplex_server.config import TlsSettings
from loraplex_server.errors import ConfigError

_log = logging.getLogger(__name__)

PEM_BYTES_MAX: Final = 1 << 20
"""Longest file read, in bytes (1 MiB)."""


def server_credentials(settings: TlsSettings) -> grpc.ServerCredentials:
    """Return the credentials of the gRPC port.

    Raises:
        ConfigError: a file cannot be read, or certificate and key do not belong together.
    """
    files = _Files(settings)
    return grpc.dynamic_ssl_server_credentials(
        files.configuration(), files.renewed, require_client_authentication=bool(settings.client_ca)
    )


class HttpTls:
    """The same for the HTTP port: a context whose files are looked at by `refresh`, not at every handshake."""

    def __init__(self, settings: TlsSettings) -> None:
        """Read the files.

        Raises:
            ConfigError: as `server_credentials`.
        """
        self._settings = settings
        self._files = _Files(settings)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.client_ca:
            self.context.load_verify_locations(settings.client_ca)
            self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_cert_chain(settings.certificate, settings.key)

    def refresh(self) -> None:
        """Use renewed files for connections from now on; blocks."""
        if self._files.renewed() is not None:
            self.context.load_cert_chain(self._settings.certificate, self._settings.key)


class _Files:
    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # guards _seen; handshakes come on gRPC's threads
        self._seen = self._read()

    def configuration(self) -> Any:
        """Return what gRPC presents and believes."""
        key, certificate, client_ca = self._seen
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)

    def renewed(self) -> Any:
        """Return a new configuration when the files changed, None otherwise; called at every handshake."""
        try:
            found = self._read()
        except ConfigError as error:
            _log.error("the certificate stays as it was: %s", error)
            return None
        with self._lock:
            if found == self._seen:
                return None
            self._seen = found
        _log.info("the certificate was renewed")
        return self.configuration()

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        key, certificate = _pem(self._settings.key), _pem(self._settings.certificate)
        _require_pair(key, certificate, self._settings)
        return key, certificate, _pem(self._settings.client_ca) if self._settings.client_ca else None


def _require_pair(key: bytes, certificate: bytes, settings: TlsSettings) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    try:
        leaf = x509.load_pem_x509_certificates(certificate)[0].public_key().public_bytes(*form)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"tls.certificate {settings.certificate} holds no PEM certificate") from error
    try:
        own = load_pem_private_key(key, None).public_key().public_bytes(*form)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"tls.key {settings.key} holds no unencrypted PEM private key") from error
    if leaf != own:
        raise ConfigError(f"tls.key {settings.key} is not the key of {settings.certificate}")


def _pem(name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            return file.read(PEM_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error

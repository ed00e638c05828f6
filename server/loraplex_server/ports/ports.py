"""The ports that calls come through: gRPC with health and reflection, and OpenAI's HTTP. Opened first, closed first.

Promises: both ports answer from the moment they are open, with UNAVAILABLE until the gate is; every call of both passes
the same guard; when they close, watchers of health are told before, and running calls get their time.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex_protos.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from loraplex_server.calls.admission import Admission
from loraplex_server.calls.embedding import Embedding
from loraplex_server.calls.gate import Gate
from loraplex_server.calls.generation import Generation
from loraplex_server.calls.guard import Guard
from loraplex_server.calls.replays import Replays
from loraplex_server.config import Config, split_address
from loraplex_server.errors import ConfigError
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.metrics import Metrics
from loraplex_server.ports.adapter_service import AdapterService
from loraplex_server.ports.generation_service import GenerationService
from loraplex_server.ports.health import Health
from loraplex_server.ports.http_api import HttpApi
from loraplex_server.ports.interceptors import CallInterceptor
from loraplex_server.ports.tls import HttpTls, server_credentials

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Ports:
    """See the module. `open`, then `close`, in one event loop.

    Attributes:
        health: what probes are told.
        port: of gRPC, the one really taken.
        http_port: of HTTP; 0 where there is none.
        http_tls: refreshes the certificate of the HTTP port; None without TLS or HTTP.
    """

    def __init__(
        self, config: Config, *, gate: Gate, guard: Guard, authenticator: Authenticator, metrics: Metrics
    ) -> None:
        self._config = config
        self._gate = gate
        self._guard = guard
        admission = Admission(gate, metrics)
        self._embedding = Embedding(admission)
        self._replays = Replays(Generation(admission), gate, metrics, keep_s=config.server.replay_s)
        self._interceptor = CallInterceptor(guard, metrics)
        self.health = Health(gate, authenticator, SERVICES)
        self._grpc: Any = None
        self._http: HttpApi | None = None
        self.http_tls: HttpTls | None = None
        self.port = 0
        self.http_port = 0

    async def open(self) -> None:
        """Listen.

        Raises:
            ConfigError: an address or a certificate cannot be used.
        """
        await self._open_grpc()
        if self._config.server.http_listen:
            await self._open_http()

    async def close(self, *, drain_s: float) -> None:
        """Refuse new calls, give running ones `drain_s` seconds. May be called twice."""
        await self.health.drain()
        closing = [] if self._grpc is None else [self._grpc.stop(drain_s)]
        if self._http is not None:
            closing.append(self._http.stop())
        await asyncio.gather(*closing)

    async def _open_grpc(self) -> None:
        server, bytes_max = self._config.server, self._config.message_bytes_max
        self._grpc = grpc.aio.server(
            interceptors=[self._interceptor],
            options=[
                ("grpc.max_receive_message_length", bytes_max),
                ("grpc.max_send_message_length", bytes_max),
                # Two servers must not share a port by accident.
                ("grpc.so_reuseport", 0),
            ],
        )
        generation = GenerationService(self._gate, self._replays, self._embedding)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._grpc)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(self._gate), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        if server.reflection:
            names = (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        try:
            if self._config.tls.certificate:
                self.port = self._grpc.add_secure_port(server.listen, server_credentials(self._config.tls))
            else:
                self.port = self._grpc.add_insecure_port(server.listen)
        except RuntimeError as error:
            raise ConfigError(f"server.listen: cannot listen on {server.listen}: {error}") from error
        await self._grpc.start()

    async def _open_http(self) -> None:
        server, tls = self._config.server, self._config.tls
        self._http = HttpApi(
            self._guard,
            self._gate,
            self._replays,
            self._embedding,
            body_bytes_max=self._config.message_bytes_max,
            drain_s=server.drain_s,
        )
        self.http_tls = HttpTls(tls) if tls.certificate else None
        host, port = split_address(server.http_listen)
        try:
            await self._http.start(host, port, self.http_tls.context if self.http_tls else None)
        except OSError as error:
            raise ConfigError(
                f"server.http_listen: cannot listen on {server.http_listen}: {error.strerror}"
            ) from error
        self.http_port = self._http.port

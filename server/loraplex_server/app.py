"""Wiring and life of the server: start, ready, drain, stop. `loraplex serve --config server.toml`.

The gRPC port opens at once, with health NOT_SERVING, so that probes see a starting server; calls are let
through when the engine answers. SIGTERM or SIGINT: health NOT_SERVING, running calls finish within
`server.drain_s`, then everything is closed and the exit status is 0. When the engine dies the process ends
with status 1 for its supervisor to start it again.
"""

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex_protos.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from loraplex_registry.delivery.cache import Cache
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_server.adapter_service import AdapterService
from loraplex_server.admission import Admission
from loraplex_server.calls import Guard
from loraplex_server.config import Config, load_config, split_address
from loraplex_server.embedding import Embedding
from loraplex_server.engine import Engine
from loraplex_server.engine_vllm import VllmEngine
from loraplex_server.errors import ConfigError, EngineUnavailableError, ServerError
from loraplex_server.gate import Backend, Gate
from loraplex_server.generation import Generation
from loraplex_server.generation_service import GenerationService
from loraplex_server.http_api import HttpApi
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.interceptors import CallInterceptor, abort_with
from loraplex_server.metrics import Metrics, MetricsPage
from loraplex_server.reconsider import reconsider_for_ever
from loraplex_server.replays import Replays
from loraplex_server.residency import Residency
from loraplex_server.tls import HttpTls, server_credentials
from loraplex_server.versions import Versions
from loraplex_server.wiring import cache_dir, load_policy, make_scheduler, make_versions, open_cache

_log = logging.getLogger(__name__)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
ENGINE_CHECK_INTERVAL_S = 1.0
CREDENTIALS_CHECK_INTERVAL_S = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class App:
    """One server. `start`, then `wait` for the engine to fail, then `stop`; all in one event loop."""

    def __init__(
        self, config: Config, *, engine: Engine | None = None, metrics: Metrics | None = None
    ) -> None:
        self._config = config
        self._cache_dir = cache_dir()
        self._engine = engine or VllmEngine(config, cache_dir=self._cache_dir)
        self._metrics = metrics or Metrics(tenants_max=config.limits.tenants_labelled_max)
        self._gate = Gate()
        self._health = _Health()
        self._residency: Residency | None = None
        self._grpc: Any = None
        self._page: MetricsPage | None = None
        self._http: HttpApi | None = None
        self._http_tls: HttpTls | None = None
        self._versions: Versions | None = None
        self._watching: list[asyncio.Task[None]] = []
        self.port = 0
        self.http_port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Open the ports, load the base model, let calls through.

        Raises:
            ConfigError: a setting, the keys file or the trust policy is wrong.
            EngineUnavailableError: the engine did not come up.
        """
        authenticator = Authenticator.from_settings(self._config.auth)
        policy, cache = load_policy(self._config), open_cache(self._config)
        host, port = split_address(self._config.server.metrics_listen)
        self._page = self._metrics.serve(host, port)
        self.metrics_port = self._page.port
        await self._open_port(authenticator)
        refreshes = [authenticator.refresh, *([self._http_tls.refresh] if self._http_tls else [])]
        self._watching.append(asyncio.create_task(_refresh(refreshes), name="watch credentials"))
        await self._engine.start()
        self._gate.open(self._backend(policy, cache))
        if self._versions is not None:
            interval_s = self._config.registry.revocations_ttl_s
            work = reconsider_for_ever(self._versions, self.residency, interval_s=interval_s)
            self._watching.append(asyncio.create_task(work, name="reconsider adapters"))
        await self._set_health(_SERVING)

    async def wait(self) -> None:
        """Watch the engine; returns never, raises EngineUnavailableError when it has died."""
        while True:
            await asyncio.sleep(ENGINE_CHECK_INTERVAL_S)
            await self._engine.check()

    async def stop(self, *, drain_s: float) -> None:
        """Refuse new work, give running calls `drain_s` seconds, close everything. May be called twice."""
        await self._health.enter_graceful_shutdown()
        ports = [] if self._grpc is None else [self._grpc.stop(drain_s)]
        if self._http is not None:
            ports.append(self._http.stop())
        await asyncio.gather(*ports)
        self._gate.close()
        for task in self._watching:
            task.cancel()
        if self._residency is not None:
            await self._residency.close()
        await self._engine.close()
        if self._page is not None:
            await asyncio.to_thread(self._page.close)
            self._page = None
        if self._versions is not None:
            await asyncio.to_thread(self._versions.close)

    @property
    def residency(self) -> Residency:
        """The adapters in the engine; after `start`."""
        assert self._residency is not None, "start() first"
        return self._residency

    async def _open_port(self, authenticator: Authenticator) -> None:
        server = self._config.server
        guard = Guard(
            authenticator=authenticator,
            metrics=self._metrics,
            default_deadline_s=server.default_deadline_s,
        )
        admission = Admission(self._gate, self._metrics)
        embedding = Embedding(admission)
        self._replays = replays = Replays(
            Generation(admission), self._gate, self._metrics, keep_s=server.replay_s
        )
        interceptor = CallInterceptor(guard, self._metrics)
        self._grpc = grpc.aio.server(
            interceptors=[interceptor],
            options=[
                ("grpc.max_receive_message_length", self._config.message_bytes_max),
                ("grpc.max_send_message_length", self._config.message_bytes_max),
                # Two servers must not share a port by accident.
                ("grpc.so_reuseport", 0),
            ],
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self._gate, replays, embedding), self._grpc
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(self._gate), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        await self._set_health(_NOT_SERVING)
        if server.reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        try:
            if self._config.tls.certificate:
                self.port = self._grpc.add_secure_port(server.listen, server_credentials(self._config.tls))
            else:
                self.port = self._grpc.add_insecure_port(server.listen)
        except RuntimeError as error:
            raise ConfigError(f"server.listen: cannot listen on {server.listen}: {error}") from error
        await self._grpc.start()
        if server.http_listen:
            await self._open_http_port(guard, replays, embedding)

    async def _open_http_port(self, guard: Guard, replays: Replays, embedding: Embedding) -> None:
        server, tls = self._config.server, self._config.tls
        self._http = HttpApi(
            guard,
            self._gate,
            replays,
            embedding,
            body_bytes_max=self._config.message_bytes_max,
            drain_s=server.drain_s,
        )
        self._http_tls = HttpTls(tls) if tls.certificate else None
        host, port = split_address(server.http_listen)
        try:
            await self._http.start(host, port, self._http_tls.context if self._http_tls else None)
        except OSError as error:
            raise ConfigError(
                f"server.http_listen: cannot listen on {server.http_listen}: {error.strerror}"
            ) from error
        self.http_port = self._http.port

    def _backend(self, policy: TrustPolicy | None, cache: Cache) -> Backend:
        config, clock = self._config, time.monotonic
        if policy is not None:
            self._versions = make_versions(config, self._engine.base, policy, cache)
        self._residency = Residency(
            engine=self._engine,
            source=self._versions or _NoSource(),
            events=self._metrics,
            slots=config.adapters.slots,
            load_timeout_s=config.adapters.load_timeout_s,
            clock=clock,
        )
        scheduler = make_scheduler(config, events=self._metrics, resident=lambda: self.residency.resident)
        self._metrics.waiting.set_function(lambda: scheduler.waiting)
        self._metrics.fairness_gap.set_function(lambda: scheduler.fairness_gap)
        self._metrics.slots_total.set(config.adapters.slots)
        self._metrics.slots_used.set_function(lambda: self.residency.slots_used)
        self._metrics.pins.set_function(lambda: self.residency.pins)
        return Backend(
            engine=self._engine,
            versions=self._versions,
            residency=self._residency,
            scheduler=scheduler,
            model_name=config.model.name,
            prompt_chars_max=config.limits.prompt_chars_max,
        )

    async def _set_health(self, status: Any) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


async def _refresh(refreshes: Sequence[Callable[[], None]]) -> None:
    """Take over changed files of credentials, for as long as the server runs."""
    while True:
        await asyncio.sleep(CREDENTIALS_CHECK_INTERVAL_S)
        for refresh in refreshes:
            try:
                await asyncio.to_thread(refresh)
            except Exception:  # whatever a file holds: the next change of another one must still be seen
                _log.exception("changed credentials could not be read; what was in force stays")


class _NoSource:
    """Stands where a registry would: nothing resolves without one, so nothing is ever staged."""

    async def stage(self, version: Any, progress: Any) -> Any:  # noqa: ARG002
        raise AssertionError("no registry, yet an adapter was resolved")

    async def confirm(self, staged: Any) -> None:
        """Nothing was staged."""

    async def discard(self, staged: Any) -> None:
        """Nothing was staged."""


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's health service, with our reason on an unknown name."""

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See grpc.health.v1."""
        if request.service not in ("", *SERVICES):
            await abort_with(context, "NOT_FOUND", f"no service {request.service[:200]!r} here")
        return await super().Check(request, context)


async def serve(config: Config) -> int:
    """Run a server until a signal or the engine's death; gives the exit status."""
    app = App(config)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(app.start())
    signalled = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return 0
        await starting
        host = split_address(config.server.listen)[0]
        http = f"OpenAI HTTP on port {app.http_port}, " if app.http_port else ""
        print(
            f"ready: {config.model.name} ({config.model.quantization}), gRPC on {host}:{app.port}, "
            f"{http}metrics on http://{host}:{app.metrics_port}/metrics",
            flush=True,
        )
        watching = asyncio.create_task(app.wait())
        await asyncio.wait({watching, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        watching.cancel()
        return 0
    finally:
        starting.cancel()
        signalled.cancel()
        await app.stop(drain_s=config.server.drain_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """`loraplex serve`: exit status 0 after a signal, 1 when the engine failed, 2 for wrong settings."""
    parser = argparse.ArgumentParser(
        prog="loraplex serve", description="Serve one base model and many tenants' adapters over gRPC."
    )
    parser.add_argument("--config", type=Path, required=True, help="settings file (TOML); see docs/server.md")
    parser.add_argument("--check", action="store_true", help="check the settings file and exit")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = load_config(options.config)
        if options.check:
            print(f"{options.config}: settings are valid")
            return 0
        import uvloop

        return int(uvloop.run(serve(config)))
    except ConfigError as error:
        print(f"loraplex serve: {error}", file=sys.stderr)
        return 2
    except (ServerError, EngineUnavailableError) as error:
        print(f"loraplex serve: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

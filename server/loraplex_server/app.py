"""Wiring and life of the server: start, ready, drain, stop. `loraplex serve --config server.toml`.

The gRPC port opens at once, with health NOT_SERVING, so that probes see a starting server; calls are let
through when the engine answers. SIGTERM or SIGINT: health NOT_SERVING, running calls finish within
`server.drain_s`, then everything is closed and the exit status is 0. When the engine dies, its calls end UNAVAILABLE,
health is NOT_SERVING and calls are refused until a fresh one has the same adapters; when it dies too often
(`supervision`), the process ends with status 1.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex_protos.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from loraplex_server.adapter_service import AdapterService
from loraplex_server.calls import Guard
from loraplex_server.config import Config, load_config, split_address
from loraplex_server.engine import Engine
from loraplex_server.engine_vllm import VllmEngine
from loraplex_server.errors import ConfigError, EngineUnavailableError, ServerError
from loraplex_server.gate import Backend, Gate
from loraplex_server.generation import Generation
from loraplex_server.generation_service import GenerationService
from loraplex_server.http_api import HttpApi
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.watched import refresh_for_ever
from loraplex_server.integrity import Patrol
from loraplex_server.interceptors import CallInterceptor, abort_with
from loraplex_server.metrics import Metrics, MetricsPage
from loraplex_server.reconsider import reconsider_all, reconsider_for_ever
from loraplex_server.residency import Residency
from loraplex_server.tls import HttpTls, server_credentials
from loraplex_server.versions import Versions
from loraplex_server.wiring import (
    cache_dir,
    load_policy,
    make_backend,
    make_supervisor,
    make_versions,
    open_cache,
)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
RECONSIDER_S_MAX = 5.0  # spent on deciding again about adapters before a fresh engine gets them
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class App:
    """One server. `start`, then `wait`, which keeps an engine alive, then `stop`; all in one event loop."""

    def __init__(
        self,
        config: Config,
        *,
        make_engine: Callable[[], Engine] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._metrics = metrics or Metrics(tenants_max=config.limits.tenants_labelled_max)
        make_engine = make_engine or (lambda: VllmEngine(config, cache_dir=cache_dir()))
        self._supervisor = make_supervisor(config, make_engine, events=self._metrics)
        self._backend: Backend | None = None
        self._gate = Gate()
        self._health = _Health()
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
        self._watch(refresh_for_ever(refreshes))
        await self._supervisor.start()
        engine = self._supervisor.engine
        if policy is not None:
            self._versions = make_versions(self._config, engine.base, policy, cache)
        self._backend = make_backend(self._config, engine, self._versions, self._metrics)
        self._gate.open(self._backend)
        if self._versions is not None:  # else there are no adapters
            interval_s = self._config.registry.revocations_ttl_s
            self._watch(reconsider_for_ever(self._versions, self.residency, interval_s=interval_s))
            self._watch(Patrol(self.residency, self._versions, clock=time.monotonic).run())
        await self._set_health(_SERVING)

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        self._watching.append(asyncio.create_task(work))

    async def wait(self) -> NoReturn:
        """Watch the engine and replace it when it dies.

        Raises:
            ConfigError, EngineUnavailableError: it cannot be replaced any more; see `Supervisor.watch`.
        """
        await self._supervisor.watch(self._engine_lost, self._engine_back)

    async def _engine_lost(self, error: EngineUnavailableError) -> None:
        self._gate.close()
        await self._set_health(_NOT_SERVING)
        await self.residency.engine_lost(error)

    async def _engine_back(self, engine: Engine) -> None:
        assert self._backend is not None
        if self._versions is not None:  # what was revoked meanwhile stays out
            with contextlib.suppress(TimeoutError):  # the rounds go on with it when the storage hangs
                async with asyncio.timeout(RECONSIDER_S_MAX):
                    await reconsider_all(self._versions, self.residency)
        await self.residency.restore(engine)
        self._backend = replace(self._backend, engine=engine)
        self._gate.open(self._backend)
        await self._set_health(_SERVING)

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
        if self._backend is not None:
            await self._backend.residency.close()
        await self._supervisor.close()
        if self._page is not None:
            await asyncio.to_thread(self._page.close)
            self._page = None
        if self._versions is not None:
            await asyncio.to_thread(self._versions.close)

    @property
    def residency(self) -> Residency:
        """The adapters in the engine; after `start`."""
        assert self._backend is not None, "start() first"
        return self._backend.residency

    async def _open_port(self, authenticator: Authenticator) -> None:
        server = self._config.server
        guard = Guard(
            authenticator=authenticator,
            metrics=self._metrics,
            default_deadline_s=server.default_deadline_s,
        )
        generation = Generation(self._gate, self._metrics)
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
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(generation), self._grpc)
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
            await self._open_http_port(guard, generation)

    async def _open_http_port(self, guard: Guard, generation: Generation) -> None:
        server, tls = self._config.server, self._config.tls
        self._http = HttpApi(
            guard,
            self._gate,
            generation,
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

    async def _set_health(self, status: Any) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


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
    tasks: list[asyncio.Task[Any]] = [starting, signalled]
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
        tasks.append(watching)
        await asyncio.wait({watching, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        return 0
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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

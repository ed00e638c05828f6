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
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from loraplex_server.adapters.integrity import Patrol
from loraplex_server.adapters.reconsider import reconsider_all, reconsider_for_ever
from loraplex_server.adapters.residency import Residency
from loraplex_server.adapters.versions import Versions
from loraplex_server.calls.gate import Backend, Gate
from loraplex_server.calls.guard import Guard
from loraplex_server.config import Config, load_config, split_address
from loraplex_server.engine.protocol import Engine
from loraplex_server.engine.vllm_engine import VllmEngine
from loraplex_server.errors import ConfigError, EngineUnavailableError, ServerError
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.metrics import Metrics, MetricsPage
from loraplex_server.observability.access_log import AccessLog, send_json_lines_to_stdout
from loraplex_server.observability.observing import hook_up, make_tracing
from loraplex_server.ports.ports import Ports
from loraplex_server.rollout.splits import Splits
from loraplex_server.watched import WatchedFile, refresh_for_ever
from loraplex_server.wiring import (
    cache_dir,
    load_policy,
    make_backend,
    make_supervisor,
    make_versions,
    open_cache,
    watch_splits,
)

RECONSIDER_S_MAX = 5.0  # spent on deciding again about adapters before a fresh engine gets them


GC_THRESHOLD = 10_000
"""Objects made since the last collection before the next one, instead of 700: a call makes hundreds a second."""


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
        self._metrics = metrics or Metrics(
            tenants_max=config.limits.tenants_labelled_max, adapters_max=config.limits.adapters_labelled_max
        )
        self._tracing = make_tracing(config.tracing)
        make_engine = make_engine or (lambda: VllmEngine(config, cache_dir=cache_dir()))
        self._supervisor = make_supervisor(config, make_engine, events=self._metrics)
        self._backend: Backend | None = None
        self._gate = Gate()
        self._page: MetricsPage | None = None
        self._versions: Versions | None = None
        self._splits: WatchedFile[Splits] | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._opened: Ports | None = None
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
        self._splits = watch_splits(self._config)
        self._opened = self._make_ports(authenticator)
        await self._opened.open()
        watched = (authenticator, self._opened.http_tls, self._splits)
        refreshes = [one.refresh for one in watched if one is not None]
        self._watch(refresh_for_ever(refreshes))
        await self._supervisor.start()
        engine = self._supervisor.engine
        if policy is not None:
            self._versions = make_versions(self._config, engine.base, policy, cache)
        self._backend = make_backend(
            self._config, engine, self._versions, self._splits, metrics=self._metrics
        )
        hook_up(
            self._metrics,
            self._config,
            scheduler=self._backend.scheduler,
            residency=self.residency,
            cache=cache,
        )
        self._gate.open(self._backend)
        if self._versions is not None:  # else there are no adapters
            interval_s = self._config.registry.revocations_ttl_s
            self._watch(reconsider_for_ever(self._versions, self.residency, interval_s=interval_s))
            self._watch(Patrol(self.residency, self._versions, clock=time.monotonic).run())
        self._ports.health.set_serving(True)

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
        self._ports.health.set_serving(False)
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
        self._ports.health.set_serving(True)

    async def stop(self, *, drain_s: float) -> None:
        """Refuse new work, give running calls `drain_s` seconds, close everything. May be called twice."""
        if self._opened is not None:
            await self._opened.close(drain_s=drain_s)
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
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
            self._tracing = None

    @property
    def residency(self) -> Residency:
        """The adapters in the engine; after `start`."""
        assert self._backend is not None, "start() first"
        return self._backend.residency

    @property
    def port(self) -> int:
        """Of gRPC; after `start` has opened it."""
        return self._ports.port

    @property
    def http_port(self) -> int:
        """Of HTTP; 0 where there is none."""
        return self._ports.http_port

    @property
    def _ports(self) -> Ports:
        assert self._opened is not None, "start() first"
        return self._opened

    def _make_ports(self, authenticator: Authenticator) -> Ports:
        server = self._config.server
        guard = Guard(
            authenticator=authenticator,
            metrics=self._metrics,
            default_deadline_s=server.default_deadline_s,
            access_log=AccessLog(server.access_log),
            tracing=self._tracing,
        )
        return Ports(
            self._config, gate=self._gate, guard=guard, authenticator=authenticator, metrics=self._metrics
        )


async def serve(config: Config) -> int:
    """Run a server until a signal or the engine's death; gives the exit status."""
    app = App(config)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(app.start())
    signalled = asyncio.create_task(stopping.wait())
    watching: asyncio.Task[NoReturn] | None = None
    try:
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return 0
        await starting
        host = split_address(config.server.listen)[0]
        http = f"OpenAI HTTP on port {app.http_port}, " if app.http_port else ""
        _freeze_heap()
        said = sys.stderr if config.server.access_log == "json" else sys.stdout  # which JSON has to itself
        print(
            f"ready: {config.model.name} ({config.model.quantization}), gRPC on {host}:{app.port}, "
            f"{http}metrics on http://{host}:{app.metrics_port}/metrics",
            file=said,
            flush=True,
        )
        watching = asyncio.create_task(app.wait())
        await asyncio.wait({watching, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        return 0
    finally:
        tasks = [task for task in (starting, watching, signalled) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await app.stop(drain_s=config.server.drain_s)


def _freeze_heap() -> None:
    """Leave what is there now out of garbage collections: a million objects of libraries that stay for ever.

    Each full collection would look through them, for 0.1 s in which no token goes out.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def main(arguments: Sequence[str] | None = None) -> int:
    """`loraplex serve`: exit status 0 after a signal, 1 when the engine failed, 2 for wrong settings.

    Once the server has run the process ends here; it never returns then.
    """
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
        if config.server.access_log == "json":
            send_json_lines_to_stdout()
    except ConfigError as error:
        print(f"loraplex serve: {error}", file=sys.stderr)
        return 2
    return _leave(_run(config))


def _run(config: Config) -> int:
    import uvloop

    try:
        return int(uvloop.run(serve(config)))
    except ConfigError as error:
        print(f"loraplex serve: {error}", file=sys.stderr)
        return 2
    except (ServerError, EngineUnavailableError) as error:
        print(f"loraplex serve: {error}", file=sys.stderr)
        return 1


def _leave(status: int) -> NoReturn:
    """End the process now that all is closed: libraries of the engine would fill the screen on their way out."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())

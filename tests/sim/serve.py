"""`loraplex serve` with the deterministic engine in vLLM's place: everything else is the real process.

`python -m tests.sim.serve --config server.toml`; the model's directory is a checkpoint that a base is read from. How
the engine behaves comes from the environment: LORAPLEX_SIM_STEP_S seconds a token, LORAPLEX_SIM_LOAD_S seconds a load,
LORAPLEX_SIM_CONTEXT tokens.
"""

import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from loraplex_registry.validation.base import BaseModel
from loraplex_server import app
from loraplex_server.config import SLOTS, Config
from tests.sim.engine import SimEngine


def make_engine(config: Config, *, cache_dir: Path) -> SimEngine:
    """What `VllmEngine(config, cache_dir=…)` would be."""
    base = BaseModel.from_directory(Path(config.model.path), name=config.model.name)
    context = int(os.environ.get("LORAPLEX_SIM_CONTEXT", "64"))
    engine = SimEngine(base, slots=config.adapters.slots or SLOTS, context_tokens=context)
    engine.step_s = float(os.environ.get("LORAPLEX_SIM_STEP_S", "0"))
    engine.load_s = float(os.environ.get("LORAPLEX_SIM_LOAD_S", "0"))
    forgetful: Any = engine
    forgetful.requests = deque(maxlen=1)  # a server's memory is watched, and not that of its engine's records
    return engine


if __name__ == "__main__":
    app.VllmEngine = make_engine  # type: ignore[assignment, attr-defined, misc]
    sys.exit(app.main())

"""The loraplex server: one base model in vLLM, adapters brought in and out while it answers gRPC calls.

`loraplex serve --config server.toml` starts it (`app`). docs/architecture.md tells the life of a request.
"""

import os

# Read when gRPC is imported. Processes are started while it runs, and none of them uses it: its handlers only warn.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

"""The loraplex server: one base model in vLLM, adapters brought in and out while it answers gRPC calls.

`loraplex serve --config server.toml` starts it (`app`). docs/architecture.md tells the life of a request.
"""

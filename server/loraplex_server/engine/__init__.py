"""The engine: what the server needs of one, vLLM as that, and keeping it alive. Nothing above knows vLLM."""

"""Where calls come in: gRPC with health, OpenAI's HTTP, and TLS. They translate, call, translate back; no policy."""

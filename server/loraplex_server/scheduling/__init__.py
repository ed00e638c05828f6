"""Who goes to the engine next, and who is refused: fairness, quotas and deadlines, ahead of vLLM's own queue."""

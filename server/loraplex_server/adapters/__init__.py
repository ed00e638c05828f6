"""Adapters, from a name somebody asks for to a slot of the engine: what they are, where they are, and when they go."""

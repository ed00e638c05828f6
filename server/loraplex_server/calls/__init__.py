"""One call, whatever port it came through: let in, given a place at the engine, answered, and counted once."""

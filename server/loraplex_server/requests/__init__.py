"""From a wire message to a checked, plain request. Pure: no clock, no network, no engine."""

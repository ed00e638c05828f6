"""From a verified manifest to bytes an engine may load."""

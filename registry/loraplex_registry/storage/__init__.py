"""Where objects are kept: a directory, S3 or memory, behind one protocol."""

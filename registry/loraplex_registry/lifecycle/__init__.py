"""What happens to a version: publish, tag, delete, collect, check, record."""

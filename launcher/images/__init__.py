"""Fetch, convert, build and check container images."""

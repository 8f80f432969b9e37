"""The version of amlaunch, readable where the distribution is not installed (a mounted code snapshot)."""

VERSION = "0.1.0"
OLDEST_TORCH, NEWEST_TORCH = (2, 8), (2, 15)
"""Ends of the range of torch that amlaunch is tested with (``make test-torch-range``)."""

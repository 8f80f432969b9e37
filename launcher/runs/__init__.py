"""The run directory: create it, find it, read its state."""

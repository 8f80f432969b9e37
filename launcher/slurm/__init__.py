"""Slurm: the client that calls it, the queue, and batch scripts."""

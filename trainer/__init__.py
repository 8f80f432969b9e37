"""Tokens to a model: data order, models, parallelism, the loop, checkpoints, metrics, export.

Importing this package loads nothing heavy: ``python -m amlaunch.trainer`` installs its
signal handlers before torch is read from disk, which takes seconds.
"""

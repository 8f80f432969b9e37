"""Checks before submission: what can never work is refused; what may not work is noted."""

"""Run one element on its host: start its ranks, watch them, decide what follows, record how it ended."""

"""Probe a machine and its cluster, judge what was found, and write a cluster profile."""

"""Diagnosis of a machine and its cluster: read facts, judge them, write a profile, measure a GPU node."""

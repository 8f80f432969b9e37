"""The recipe format, the shipped recipes, and what all processes share: files, exit codes, run directory layout."""

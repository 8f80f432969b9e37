"""Run a stage in a container: runtimes, the images that they start, and the preparation of each node."""

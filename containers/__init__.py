"""Run a stage in an image: container runtimes, the images they start, and what happens on each node before they start."""

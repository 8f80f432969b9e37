"""Container runtimes, one module each: image, mounts, variables and command become an argv."""

"""Submit a run: resolve, check, write, submit."""

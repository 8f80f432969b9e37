"""The process of one rank: arguments, environment, stop requests, hangs, errors and exit codes."""

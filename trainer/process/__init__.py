"""The process of one rank: arguments, environment, stop requests, hang watch, errors and exit codes."""

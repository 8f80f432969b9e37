"""The command line, planning, submission, execution and status of runs. Never loads torch, datasets or tiktoken."""

"""Where and when: command line, plan, driver, run directory, status, logs. Never loads torch, datasets or tiktoken."""

"""The training job: set-up, the loop, validation, and saving on request."""

"""Names of the regions that the trainer marks in a profiler trace."""

LOSS_REGION = "amlaunch.loss"
"""Region of the loss, the head's matrix products included."""

"""Plain data: plans, cluster profiles and machines."""

"""fastcl.metrics against dense definitions, and at n = 100,000."""

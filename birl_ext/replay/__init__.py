"""What was experienced, kept to be sampled."""

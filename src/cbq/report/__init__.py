"""What a user sees of a run: progress while it works and a summary at its end."""

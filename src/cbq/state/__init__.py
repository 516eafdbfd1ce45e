"""What a run that was interrupted goes on from."""

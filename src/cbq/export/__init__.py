"""Export: checkpoints that inference engines load, with the same answers."""

"""What is done to a model before it is reconstructed (paper section 3.4)."""

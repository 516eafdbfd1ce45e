"""What a model's loss depends on: Hessians, loss surfaces, and how much each linear suffers (section 2, Figure 1)."""

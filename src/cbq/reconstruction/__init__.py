"""Cross-block reconstruction: windows, losses and how a window is solved (paper sections 3.1 and 3.3)."""

"""Data: the texts, and the calibration segments drawn from them. The only door to datasets."""

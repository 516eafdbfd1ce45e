"""Hidden states of all segments: where they are kept, and how batches of them come and go."""

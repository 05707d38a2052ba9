"""The frozen teacher: how it is built, what it sees of a batch, and how it is made fast."""

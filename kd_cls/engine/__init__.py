"""The training loop, its optimizer, meters, writers and evaluation."""

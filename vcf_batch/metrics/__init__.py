"""Scores of generated images: batches in, numbers out (docs/method.md, section 6)."""

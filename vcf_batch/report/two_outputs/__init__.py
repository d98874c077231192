"""``report A B``: two outputs side by side, row by row."""

"""Stable Diffusions that are one file: which one a file is, and the configurations that it does not have."""

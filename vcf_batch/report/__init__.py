"""Look at an output, and hand it on: what a run has left behind, as figures, as pictures and in words."""

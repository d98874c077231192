"""Visual Concept Fusion (docs/method.md): image aligner, fusion, and the pipeline that samples with them."""

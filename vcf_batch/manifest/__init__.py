"""The manifest: Parquet in, checked rows and their reference images out; and the builder of manifests."""

"""The networks of the suite, one module per model family (see `base`)."""

"""The networks of the suite: one module per family, turning raw examples into logits (see `base`)."""

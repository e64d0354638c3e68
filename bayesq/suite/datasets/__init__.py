"""The data sets of the suite: one module each, all yielding the same three disjoint splits (see `base`)."""

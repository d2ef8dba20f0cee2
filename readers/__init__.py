"""How images and data sets are read."""

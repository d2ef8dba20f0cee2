"""The drawn data set and its localizer."""

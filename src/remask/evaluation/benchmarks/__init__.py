"""Published data sets and the closed world, as named groups of facts."""

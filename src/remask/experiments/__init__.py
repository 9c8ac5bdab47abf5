"""What the command line runs: teaching recipes, audits, the demonstration."""

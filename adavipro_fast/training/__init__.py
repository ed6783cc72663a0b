"""Training: configuration, runs, checkpoints of a run, results and the search of `compare`."""

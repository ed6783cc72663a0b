"""Read and write checkpoints, task files, exported files and their descriptions."""

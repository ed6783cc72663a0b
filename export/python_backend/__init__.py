"""Models that Triton's Python backend runs around an exported file."""

"""Models for Triton's Python backend that run before and after an exported file."""

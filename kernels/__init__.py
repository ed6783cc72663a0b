"""Fused Triton operations."""

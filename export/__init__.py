"""Exporters: one deployable file from a checkpoint."""

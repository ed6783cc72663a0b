"""One run: how it is configured, started, trained, kept and drawn."""

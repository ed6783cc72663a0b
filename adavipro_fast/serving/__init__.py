"""Serving: requests of many clients gathered into batches, over HTTP."""

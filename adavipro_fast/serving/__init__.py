"""An HTTP server that gathers the requests of many clients into batches."""

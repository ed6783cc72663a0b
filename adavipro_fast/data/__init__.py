"""Data sets, image decoding, the cache of decoded images, and metrics."""

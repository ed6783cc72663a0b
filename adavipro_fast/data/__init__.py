"""Where pixels come from: data sets, decoding, the cache, and what is measured on them."""

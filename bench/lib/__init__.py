"""Code shared by the benches; it does not import any of them."""

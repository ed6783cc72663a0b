"""What the benches share; it imports none of them."""

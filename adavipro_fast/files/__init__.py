"""What is stored, and how it is read back."""

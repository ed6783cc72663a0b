"""Many pictures: where they come from, how they are classified, and where the rows go."""

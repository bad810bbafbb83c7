"""Weight (and data) → its first factors."""

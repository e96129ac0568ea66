"""What a user may set, and what of it goes together."""

"""Files that a crash may not halve, and what is deleted from them."""

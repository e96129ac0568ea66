"""What `run_unlearn` does, from the request to what is written."""

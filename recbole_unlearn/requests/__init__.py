"""A queue of deletion requests, for whoever has to answer them in time: ``python -m recbole_unlearn.requests``."""

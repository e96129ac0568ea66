"""The seam between RecBole's models and the numerics in ``influence``: which models, their losses, their data."""

"""How near methods and models come to retraining, over seeds."""

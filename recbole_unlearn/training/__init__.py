"""RecBole's trainer with a log, one training and one again without some rows, and checkpoints to unlearn from."""

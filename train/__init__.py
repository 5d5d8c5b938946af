"""The scripts that make the checkpoints; run them as `python -m train.NAME` from the project's folder."""

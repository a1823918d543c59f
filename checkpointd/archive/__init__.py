"""Guests into files and back: what `checkpointd save` and `checkpointd restore` are made of."""

"""Primary: the engine that checkpoints a running guest."""

"""Secondary: the standby that keeps the replica and runs it when the primary is gone."""

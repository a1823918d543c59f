"""What makes a process a daemon: configuration, units, logs, metrics, health."""

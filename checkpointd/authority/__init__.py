"""Who may run the guest: terms on stable storage, and fencing."""

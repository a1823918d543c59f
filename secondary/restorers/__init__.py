"""What takes committed epochs and runs the guest from them."""

"""Xen: the adapter of the hypervisor port for real guests."""

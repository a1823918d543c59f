"""The embedded hypervisor: a guest in a process of its own, with a dirty log, a p2m and a NIC."""

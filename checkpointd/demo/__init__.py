"""A whole installation on one machine, a failover in it, and the proof that nothing was lost.

rig.py starts and kills the processes, load.py talks to the guest as its users do, proof.py compares guest and oracle.
The demo and the fault tests are two users of the same parts.
"""

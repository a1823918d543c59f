"""Would protection begin, and would a failover work? Facts are gathered here, and judged apart from that."""

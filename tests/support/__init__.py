"""What several tests use: losses, oracles, random programs."""

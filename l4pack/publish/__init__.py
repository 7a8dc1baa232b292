"""Everything that must go with an artifact, and everything that must be true before it leaves."""

"""What keeps a job safe: its identity, its journal, its folder."""

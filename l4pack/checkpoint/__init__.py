"""Reading checkpoints, writing shards, and the journal of a job."""

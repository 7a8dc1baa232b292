"""Work spread over the machines of a Ray cluster: Ray places, retries and watches; what is done, a job's journal says."""

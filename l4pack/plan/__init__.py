"""Every tensor's fate, every output byte, and what a run needs, from headers alone."""

"""What each part of a model costs, in harm, at each precision."""

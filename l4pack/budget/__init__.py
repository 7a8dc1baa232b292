"""Memory budgets: what a GPU must hold, line by line, and whether it can."""

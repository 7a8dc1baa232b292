"""Pages and charts of what was found."""

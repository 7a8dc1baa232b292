"""One broken input per failure. Each function takes a good checkpoint folder, or an empty one, and spoils it."""

"""What Llama 4 is: its configuration, and every tensor's name, role, layout and shape."""

"""An artifact as a 16-bit checkpoint again, in the layout that Llama 4 is released in."""

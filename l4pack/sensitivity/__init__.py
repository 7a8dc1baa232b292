"""What each part of a model costs when it is quantized alone: measured once, good for every budget."""

"""On-disk formats: the tensors that stand for one quantized matrix, what goes into them and comes back, who reads them."""

"""The walk back through a model: second moments of the end loss' gradients, one matrix a layer."""

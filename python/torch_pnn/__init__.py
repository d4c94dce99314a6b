"""torch-pnn: the perturbation layer of Perturbative Neural Networks as a PyTorch operator with a C core."""

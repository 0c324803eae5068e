"""Who computes: compiled code for the CPU, for CUDA, or PyTorch."""

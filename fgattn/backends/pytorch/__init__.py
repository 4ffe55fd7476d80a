"""Plain PyTorch: any device, any head size."""

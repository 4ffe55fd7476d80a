"""What computes sparse attention: one folder a backend, behind the record of `base`."""

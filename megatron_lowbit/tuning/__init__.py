"""What communication costs on a machine: modelled beforehand, or measured on it."""

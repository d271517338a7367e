"""What copies for inference compute with: `brainfm.optimize`."""

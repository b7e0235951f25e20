"""What attention, a training step and a selection cost on this machine, and which settings to train with."""

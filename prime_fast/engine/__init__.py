"""A model on its devices: DeepSpeed, packed forward, batches, process group, checkpoints."""

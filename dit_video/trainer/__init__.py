"""Lightning and hardware: the module, optimisers, EMA, checkpoints and callbacks."""

"""The networks: plain torch modules that know neither the objective nor the trainer."""

"""From noise to video: solvers, guidance and generate, plain functions of a model."""

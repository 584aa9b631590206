"""A small universe with exact ground truth: state to frames and caption, frames back to state. numpy alone."""

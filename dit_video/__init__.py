"""dit_video: a research training framework for video diffusion transformers."""

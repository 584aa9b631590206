"""Clips as latents and back. An autoencoder is frozen: it has a compression, a number of channels, `encode` and `decode`."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from dit_video.shapes import PIXELS, Patch


class Autoencoder(ABC):
    """The seam for autoencoders: causal in time, so that the first frame's latents are those of the frame by itself.

    A clip of 1 + k * compression.t frames has 1 + k frames of latents. What a clip is encoded to does not depend on its batch.
    """

    compression: Patch  # frames, rows and columns of pixels in a latent
    channels: int

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with everything that the latents depend on: weights, scaling, precision."""

    @abstractmethod
    def encode(self, video: Float[Tensor, "b T H W 3"]) -> Float[Tensor, "b t h w c"]:
        """Latents of clips in [-1, 1], scaled so that each channel has a spread of about 1, float32."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b T H W 3"]:
        """Clips in [-1, 1], give or take, of latents."""


class Pixels(Autoencoder):
    """No autoencoder: pixels are made themselves."""

    compression, channels, fingerprint = PIXELS, 3, "pixels"

    def __init__(self, channels: int = 3) -> None:
        if channels != 3:
            raise ValueError(f"pixels have 3 channels, got {channels}; set autoencoder.channels=3, or autoencoder")

    def encode(self, video: Float[Tensor, "b T H W 3"]) -> Float[Tensor, "b t h w c"]:
        return video

    def decode(self, latents: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b T H W 3"]:
        return latents

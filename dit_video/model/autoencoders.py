"""Clips as latents and back. An autoencoder is frozen: it has a compression, a number of channels, `encode` and `decode`.

Those that were trained elsewhere are in pretrained_autoencoder.py.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from dit_video.shapes import PIXELS, Patch


class Autoencoder(ABC):
    """The seam for autoencoders. A clip of 1 + k * compression.t frames has 1 + k frames of latents, whatever its batch.

    Where it is causal, the latents of a clip's beginning (1 + k * compression.t frames) are those of the beginning by itself, so they may
    be given without telling what follows.
    """

    compression: Patch  # frames, rows and columns of pixels in a latent
    channels: int
    causal: bool = True

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with everything that the latents depend on: weights, scaling, precision."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{type(self).__name__} {self.fingerprint[:8]}"

    @property
    def can_decode(self) -> bool:
        """Whether it is here, and not only what is known of it."""
        return True

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of its weights, so that they must use it equally often."""
        return False

    def device_bytes(self, ranks: int = 1, in_use: bool = False) -> int:
        """What its weights hold of a rank's device between uses, or in use, where so many ranks train."""
        return 0

    def check(self) -> None:
        """ValueError where it cannot be used, as far as a glance tells."""
        return

    def check_clip(self, num_frames: int, height: int, width: int) -> None:
        """ValueError where a clip of pixels has a shape that cannot be encoded; it names the nearest that can."""
        return

    @abstractmethod
    def encode(self, video: Float[Tensor, "b T H W 3"]) -> Float[Tensor, "b t h w c"]:
        """Latents of clips in [-1, 1], scaled so that each channel has a spread of about 1, float32."""

    def encode_distribution(
        self, video: Float[Tensor, "b T H W 3"]
    ) -> tuple[Float[Tensor, "b t h w c"], Float[Tensor, "b t h w c"] | None]:
        """Mean, which is what `encode` gives, and logarithm of the variance of the latents; none where they have no variance."""
        return self.encode(video), None

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

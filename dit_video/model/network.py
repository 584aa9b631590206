"""The network that is trained, averaged and saved as one, a text encoder and a video transformer, and the frozen autoencoder beside it."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from dit_video.model.autoencoders import Autoencoder, Pixels
from dit_video.model.text import TextEncoder
from dit_video.model.transformer import Transformer
from dit_video.shapes import Batch, Caption, Grid, Stream, Tokens, grid_of, to_float


class Network(nn.Module):
    """Streams and captions in; each stream's values, and the hidden states asked for, out."""

    def __init__(self, text: TextEncoder, transformer: Transformer, autoencoder: Autoencoder | None = None) -> None:
        super().__init__()
        self.text, self.transformer = text, transformer
        self.autoencoder = autoencoder or Pixels()

    @property
    def tokens(self) -> Tokens:
        """How clips become this network's tokens."""
        return Tokens(self.transformer.patch, self.autoencoder.compression, self.transformer.reference_rate)

    def grid(self, batch: Batch) -> Grid:
        """The token grid of a batch, whether or not its clips are latents yet."""
        if batch.latents is not None:
            return grid_of(batch.latents, self.transformer.patch)
        assert batch.video is not None
        return grid_of(batch.video, self.tokens.span)

    def as_latents(self, batch: Batch) -> Batch:
        """The batch with latents of its clips, unless it came with them, or pixels are what is made."""
        if batch.latents is not None or isinstance(self.autoencoder, Pixels):
            return batch
        assert batch.video is not None
        mean, logvar = self.autoencoder.encode_distribution(to_float(batch.video))
        return replace(batch, latents=mean, logvar=logvar)

    def forward(
        self, streams: dict[str, Stream], captions: Sequence[Caption], taps: tuple[str, ...] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.transformer(streams, self.text(captions), taps)

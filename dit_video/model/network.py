"""The network that is trained, averaged and saved as one, a text encoder and a video transformer, and what is frozen beside it."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dit_video.model.autoencoders import Autoencoder, Pixels
from dit_video.model.pretrained_image import ImageEncoder
from dit_video.model.text import TextEncoder
from dit_video.model.transformer import Transformer
from dit_video.model.wan import given_then_grey, image_control
from dit_video.shapes import Batch, Caption, Grid, Stream, Tokens, grid_of, to_float


class Network(nn.Module):
    """Streams and captions in; each stream's values, and the hidden states asked for, out."""

    def __init__(
        self,
        text: TextEncoder,
        transformer: Transformer,
        autoencoder: Autoencoder | None = None,
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        super().__init__()
        self.text, self.transformer = text, transformer
        self.autoencoder, self.image_encoder = autoencoder or Pixels(), image_encoder

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

    @property
    def takes_images(self) -> bool:
        """Whether first frames are told by channels beside the latents, as published image-to-video models take them."""
        return bool(getattr(self.transformer, "control_channels", 0))

    @property
    def takes_image_states(self) -> bool:
        """Whether it is told of first frames by states of an image encoder too."""
        return bool(getattr(self.transformer, "image_dim", 0))

    @property
    def encoders(self) -> dict[str, str | None]:
        """Who makes latents and states, by fingerprint; none of what is not here, or is trained along."""
        return {part: self.encoder(part) for part in ("autoencoder", "text", "image_encoder")}

    def encoder(self, part: str) -> str | None:
        """One of them; ValueError where it should be here, and is not."""
        if part == "autoencoder":
            return self.autoencoder.name if self.autoencoder.can_decode else None
        if part == "text":
            return self.text.name if self.text.is_frozen and self.text.is_here else None
        images = self.image_encoder
        return images.name if images is not None and images.is_here else None

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of what is frozen, so that they must encode and decode equally often."""
        own = self.image_encoder
        return self.text.is_cut or self.autoencoder.is_cut or (own is not None and own.is_cut)

    def image_states(self, frames: UInt8[Tensor, "b H W 3"]) -> Float[Tensor, "b i e"]:
        """What the image encoder says of first frames."""
        if self.image_encoder is None:
            raise ValueError(
                "the model takes states of an image encoder, and there is none; set image_encoder=clip and image_encoder.folder"
            )
        states: Tensor = self.image_encoder(frames)
        return states

    def as_latents(self, batch: Batch) -> Batch:
        """The batch with latents of its clips, and what is told of their first frames, unless it came with them or pixels are made."""
        if not self.takes_image_states:
            batch = replace(batch, image=None)  # which may lie in shards that another model reads too
        elif batch.image is None:
            if batch.video is None:
                raise ValueError(
                    "the model takes states of an image encoder, and these latents come without: encode them with this model"
                )
            batch = replace(batch, image=self.image_states(batch.video[:, 0]))
        if batch.latents is None and not isinstance(self.autoencoder, Pixels):
            assert batch.video is not None
            video = to_float(batch.video)
            mean, logvar = self.autoencoder.encode_distribution(video)
            known = self.autoencoder.encode(given_then_grey(video[:, :1], video.shape[1])) if self.takes_images else None
            batch = replace(batch, latents=mean, logvar=logvar, known=known)
        if not self.takes_images:
            return batch
        if batch.known is None:
            raise ValueError(
                "the model takes first frames by channels, and these latents come without: encode them with this model"
            )
        return replace(batch, control=image_control(batch.known, 1, self.tokens.patch, self.tokens.compression.t))

    def forward(
        self,
        streams: dict[str, Stream],
        captions: Sequence[Caption],
        taps: tuple[str, ...] = (),
        image: Float[Tensor, "b i e"] | None = None,  # states of first frames, see image_states
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        context = self.text(captions)
        return self.transformer(streams, context if image is None else replace(context, image=image), taps)

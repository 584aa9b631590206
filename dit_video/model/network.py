"""The network that is trained, averaged and saved as one: a text encoder and a video transformer."""

from collections.abc import Sequence

from torch import Tensor, nn

from dit_video.model.text import TextEncoder
from dit_video.model.transformer import VideoTransformer
from dit_video.shapes import Stream


class Network(nn.Module):
    """Streams and captions in; each stream's values, and the hidden states asked for, out."""

    def __init__(self, text: TextEncoder, transformer: VideoTransformer) -> None:
        super().__init__()
        self.text, self.transformer = text, transformer

    def forward(
        self, streams: dict[str, Stream], captions: Sequence[str | None], taps: tuple[str, ...] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.transformer(streams, self.text(captions), taps)

"""Video-text rewards: one cosine per video, from networks with a fixed number of frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import VideoPrismClipModel, XCLIPModel

from bpgo_video.rewards.backbones import Backbone, Backbones, Dtype, NetworkReward, Preprocessing
from bpgo_video.rewards.base import Clips, Device, FrameSampling, FrameScores, evenly_spread


class VideoTextScore(NetworkReward):
    """cos(video, prompt) on the network's own number of frames, evenly spread.

    Args:
        model: local folder or hub id.

    Attributes:
        padding: of the texts, see `Backbone.tokenizer`.
    """

    range = (-1.0, 1.0)
    padding = "longest"

    def __init__(
        self, model: str, device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None
    ):
        super().__init__(model, None, None, device, dtype, backbones)

    def use(self, backbone: Backbone, folder: Path) -> None:
        super().use(backbone, folder)
        self.frames = FrameSampling(count=backbone.network.config.vision_config.num_frames)
        self.tokenizer = backbone.tokenizer(folder, self.padding)

    @abstractmethod
    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        """A function (pixels of some videos, their rows among the texts) -> their cosines."""

    def __call__(self, clips: Clips) -> FrameScores:
        indices = evenly_spread(self.frames.count or 1, clips.videos.shape[1])
        cosines = self.backbone.video_features(clips, indices, self.preprocessing, self.cosines(clips.texts))
        return FrameScores(cosines[:, None])


class XClipScore(VideoTextScore):
    """cos(video, text given the video) of an XCLIPModel (arXiv 2208.02816): 8 frames in microsoft/xclip-base-patch32.

    Attention over the video's patches shifts the text's embedding.
    """

    name = "xclip_score"
    network = XCLIPModel

    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        network, tokens = self.backbone.network, self.tokenizer(texts)

        def compare(pixels: Tensor, rows: slice) -> Tensor:
            output = network(input_ids=tokens.input_ids[rows], pixel_values=pixels)
            return (output.logits_per_video / network.logit_scale.exp()).diagonal()

        return compare


class VideoPrismScore(VideoTextScore):
    """cos(video, text) of a VideoPrismClipModel (arXiv 2402.13217).

    Frames are stretched to the network's size, as values in [0, 1]: 16 frames of 288x288 in
    google/videoprism-lvt-base-f16r288.
    """

    name = "videoprism_score"
    network = VideoPrismClipModel
    padding = "max_length"

    def preprocessing_of(self, backbone: Backbone, folder: Path) -> Preprocessing:
        side = backbone.network.config.vision_config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        return Preprocessing("stretch", size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        network, tokens = self.backbone.network, self.tokenizer(texts)
        embedded = network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output.float()

        def compare(pixels: Tensor, rows: slice) -> Tensor:
            videos = network.get_video_features(pixels).pooler_output.flatten(1).float()
            return cosine_similarity(videos, embedded[rows], dim=-1)

        return compare

"""A reward of your own: the share of each frame that the object covers, from 0 to 1."""

from bpgo_video.rewards import Clips, FrameSampling, FrameScores


class Size:
    name, version = "size", "1"  # change the version whenever scores change: priors are measured again
    range = (0.0, 1.0)
    higher_is_better, differentiable, kind = True, False, "real"
    frames = FrameSampling()  # scores every frame; FrameSampling(count=4) would score four

    def __call__(self, clips: Clips) -> FrameScores:  # clips.videos: (samples, frames, 3, height, width) in [0, 1]
        object_pixels = clips.videos.amax(dim=2) > 0.4  # the background of these videos is dark
        return FrameScores(object_pixels.float().mean(dim=(2, 3)), clips.times)  # one score per video and frame

"""Scores of VBench's code on small networks.

    python measure.py VIDEOS.json RESULT.json     {dimension: [score, [result, ...]]}

Runs where the package vbench is installed without its dependencies. Modules that its files import and that no measured
line calls are replaced by empty ones: clip, dreamsim, easydict, imageio, omegaconf, pyiqa, and the two of ViCLIP, which
small networks replace. torchvision is the substitute next to this file. Transforms, loops, formulas and means are
VBench's.
"""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

for name in ("clip", "dreamsim", "easydict", "imageio", "omegaconf", "pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch"):
    sys.modules[name] = MagicMock()
for name in ("ViCLIP", "ViCLIP.viclip", "ViCLIP.simple_tokenizer", "amt.utils.build_utils"):
    sys.modules[f"vbench.third_party.{name}"] = MagicMock()
for name in ("", ".cotracker", ".cotracker.utils", ".cotracker.utils.visualizer"):
    sys.modules[f"vbench2_beta_i2v.third_party{name}"] = MagicMock()

import tiny_networks as tiny  # noqa: E402
import torch  # noqa: E402
import vbench.aesthetic_quality  # noqa: E402
import vbench.appearance_style  # noqa: E402
import vbench.background_consistency  # noqa: E402
import vbench.dynamic_degree  # noqa: E402
import vbench.imaging_quality  # noqa: E402
import vbench.motion_smoothness  # noqa: E402
import vbench.overall_consistency  # noqa: E402
import vbench.subject_consistency  # noqa: E402
import vbench.temporal_flickering  # noqa: E402
import vbench.temporal_style  # noqa: E402
import vbench2_beta_i2v.camera_motion  # noqa: E402
import vbench2_beta_i2v.i2v_background  # noqa: E402
import vbench2_beta_i2v.i2v_subject  # noqa: E402


class Clip:
    """A network with the interface of CLIP, ViCLIP and DreamSim models."""

    def eval(self):
        return self

    def encode_image(self, pixels):
        return tiny.features(pixels)

    def encode_text(self, text):
        return tiny.text_feature(text)

    def encode_vision(self, frames, test):
        return tiny.video_feature(frames)

    def __call__(self, image, text):
        logits = tiny.logits(image, text)[:, None]
        return logits, logits.T


class Dynamic(vbench.dynamic_degree.DynamicDegree):
    def load_model(self):
        self.model = lambda before, after, iters, test_mode: (None, tiny.flow(before, after))


class Smooth(vbench.motion_smoothness.MotionSmoothness):
    def load_model(self):
        self.model = lambda before, after, embt, scale_factor, eval: {"imgt_pred": tiny.between(before, after)}


class Camera(vbench2_beta_i2v.camera_motion.CameraPredict):
    def __init__(self):
        self.device, self.grid_size, self.number_points = "cpu", 10, 1

    def model(self, video, grid_size):
        return tiny.tracks(video, grid_size), None


def text_of(tokens):
    return SimpleNamespace(to=lambda device: tokens[0])


vbench.appearance_style.clip.tokenize = text_of


def linear_head():
    layer = torch.nn.Linear(16, 1)
    weight, bias = tiny.head()
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def main(entries):
    videos = [entry["video"] for entry in entries]
    prompts = [{"prompt": entry["prompt"], "video_list": [entry["video"]]} for entry in entries]
    styles = [{**p, "auxiliary_info": {"appearance_style": e["style"]}} for p, e in zip(prompts, entries, strict=True)]
    pairs = [(entry["image"], entry["video"]) for entry in entries]
    network = Clip()
    measured = {
        "subject_consistency": vbench.subject_consistency.subject_consistency(tiny.features, videos, "cpu", False),
        "background_consistency": vbench.background_consistency.background_consistency(
            network, None, videos, "cpu", False
        ),
        "temporal_flickering": vbench.temporal_flickering.temporal_flickering(videos),
        "motion_smoothness": vbench.motion_smoothness.motion_smoothness(Smooth("", "", "cpu"), videos),
        "dynamic_degree": vbench.dynamic_degree.dynamic_degree(Dynamic(None, "cpu"), videos),
        "aesthetic_quality": vbench.aesthetic_quality.laion_aesthetic(linear_head(), network, videos, "cpu"),
        "imaging_quality": vbench.imaging_quality.technical_quality(tiny.points, videos, "cpu"),
        "overall_consistency": vbench.overall_consistency.overall_consistency(network, prompts, None, "cpu"),
        "temporal_style": vbench.temporal_style.temporal_style(network, prompts, None, "cpu"),
        "appearance_style": vbench.appearance_style.appearance_style(network, styles, "cpu"),
        "i2v_subject": vbench2_beta_i2v.i2v_subject.i2v_subject(tiny.features, pairs, "cpu"),
        "i2v_background": vbench2_beta_i2v.i2v_background.i2v_background(
            SimpleNamespace(embed=tiny.features), pairs, "cpu"
        ),
        "camera_motion": vbench2_beta_i2v.camera_motion.camera_motion(Camera(), videos),
    }
    return {name: [float(found[0]), [float(v["video_results"]) for v in found[-1]]] for name, found in measured.items()}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        entries = json.load(file)
    result = main(entries)
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)

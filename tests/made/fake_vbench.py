"""A fake of VBench's package, controlled by the environment variable BEHAVIOUR."""

from __future__ import annotations

from pathlib import Path

FAKE = '''
import json, os
from pathlib import Path

class VBench:
    """Fails or succeeds by BEHAVIOUR; records its arguments."""
    def __init__(self, device, full_info, output):
        self.device, self.full_info, self.output = str(device), full_info, Path(output)

    def evaluate(self, videos_path, name, dimension_list, mode, local):
        (self.output / f"{name}.calls").open("a").write(f"{self.device} {mode} {local} {self.full_info}\\n")
        how = json.loads(os.environ["BEHAVIOUR"]).get(name, "whole")
        if how == "fails":
            raise RuntimeError("CUDA out of memory")
        paths = [os.path.join(videos_path, name) for name in sorted(os.listdir(videos_path))]
        videos = [{"video_path": path, "video_results": 0.5} for path in paths]
        videos = videos[:-1] if how == "partial" else videos
        score = float("nan") if how == "nan" else 0.5
        if how != "silent":
            (self.output / f"{name}_eval_results.json").write_text(json.dumps({name: [score, videos]}))
'''


def fake_package(site: Path) -> Path:
    """Write the package into `site`, which must be on the interpreter's path."""
    folder = site / "vbench"
    folder.mkdir(parents=True)
    (site / "torch.py").write_text("device = str")  # the real package takes seconds to import in each process
    (folder / "__init__.py").write_text(FAKE)
    return folder

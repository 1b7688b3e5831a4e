"""A run's model as one ONNX file: photographs in, normalised embeddings out, resizing and mirror average inside.

    images      uint8 [batch, height, width, 3], RGB, upright, of any size (of a run with --resize pad: padded to squares)
    embeddings  float32 [batch, 512], of length 1: their inner product is the cosine similarity

Reads  output/<run>/{best.pt,extract.json,train.npy}, input/train.csv and some images to check the result on
Writes output/<run>/model.onnx

    pip install onnx onnxruntime onnxscript
    python scripts/export_onnx.py --run nfnet_l0/fold0
    python scripts/export_onnx.py --run tf_efficientnet_lite1/fold0 --input input/demo --output output/demo
"""

import contextlib
import io
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, atomic, load_json, load_npy, run, script_parser

import numpy as np
import torch
import torch.nn.functional as F
from export_index import need
from torch import nn

from dataset import load_train, read_image, resize
from extract import load_model

ALIKE = 1e-3  # largest difference that the check lets pass between ONNX Runtime and PyTorch


class Embedder(nn.Module):
    """The run's embedding of whole photographs, see the top of the file."""

    def __init__(self, model, sizes):
        super().__init__()
        self.model, self.sizes = model, sizes

    def forward(self, images):
        images, sum_ = images.permute(0, 3, 1, 2).float(), 0.0
        for size in self.sizes:
            x = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False).round()
            sum_ = sum_ + self.model(torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)).mean(0)
        return F.normalize(sum_)


def parse_args():
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--run", required=True, metavar="ARCH/foldK", help="the run to export")
    parser.add_argument("--n", type="count", default=16, help="training images that the result is checked on (default 16)")
    return parser.parse_args()


def export(model, path):
    """Write the Embedder as ONNX, batch, height and width left open."""
    example = torch.zeros(3, 90, 70, 3, dtype=torch.uint8)
    free = {i: torch.export.Dim(name, min=1 if i == 0 else 2) for i, name in enumerate(("batch", "height", "width"))}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter talks a lot
        torch.onnx.export(model, (example,), path, dynamo=True, external_data=False, input_names=["images"],
                          output_names=["embeddings"], dynamic_shapes={"images": free})


def check(path, model, photographs):
    """Embeddings by ONNX Runtime [n, 512]; an error where they differ from PyTorch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for image in photographs:
        with torch.inference_mode():
            expected = model(torch.from_numpy(image)[None]).numpy()
        found.append(session.run(None, {"images": image[None]})[0])
        if not np.abs(found[-1] - expected).max() < ALIKE:
            raise InputError(f"the exported model gives other embeddings (off by {np.abs(found[-1] - expected).max():.1g}); "
                             "nothing was written. Try another version of onnx, onnxruntime and onnxscript")
    return np.concatenate(found)


def main():
    args = parse_args()
    for package in ("onnx", "onnxruntime", "onnxscript"):
        need(package, package)
    folder = Path(args.output) / args.run
    if not (folder / "extract.json").exists():
        raise InputError(f"{folder} has no embeddings; run train.py and extract.py first")
    stamp, train = load_json(folder / "extract.json"), load_train(args)
    model = Embedder(load_model(folder, stamp, torch.device("cpu")), stamp["sizes"]).eval()
    rows = np.linspace(0, len(train) - 1, min(args.n, len(train))).astype(int)
    photographs = [read_image(Path(args.input) / train["path"][row]) for row in rows]
    if stamp["resize"] == "pad":
        photographs = [resize(image, max(image.shape[:2]), "pad") for image in photographs]
    target = folder / "model.onnx"
    with atomic(target) as temporary:
        export(model, str(temporary))
        found = check(str(temporary), model, photographs)
    ours = F.normalize(torch.from_numpy(np.array(load_npy(folder / "train.npy", (len(train), None))[rows]))).numpy()
    cosine = (found * ours).sum(1)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; equal to PyTorch on {len(rows)} images; cosine to extract.py's "
          f"embeddings, which resize with OpenCV: {cosine.min():.4f} at least, {np.median(cosine):.4f} in the middle")


if __name__ == "__main__":
    run(main)

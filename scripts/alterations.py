"""Known alterations of photographs: scripts/expect.py learns by them how the signs of an error go with errors, and
scripts/bench_expect.py alters test images in the same ways, each left out of what is learned for it."""

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dataset import Images


def noisy(image):
    return (image + 35 * torch.randn(image.shape)).clamp(0, 255).to(torch.uint8)


def coarse(image):
    height, width = image.shape[1:]
    return TF.resize(TF.resize(image, [max(1, height // 6), max(1, width // 6)], antialias=True), [height, width])


def covered(image):
    return v2.RandomErasing(1.0, (0.3, 0.3), (0.5, 2), value=127)(image)


def zoomed(image):
    return v2.RandomResizedCrop(image.shape[1:], (0.36, 0.36), (1, 1), antialias=True)(image)


def blurred(image):
    return TF.gaussian_blur(image, 2 * (image.shape[1] // 50) + 1, image.shape[1] / 100)


def tinted(red, green, blue):
    return lambda image: (image * torch.tensor([red, green, blue]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8)


def shadowed(image):
    return (image * torch.linspace(0.2, 1.2, image.shape[2])).clamp(0, 255).to(torch.uint8)


def shaken(image):
    length = 2 * (image.shape[2] // 24) + 1
    side = F.pad(image.float()[:, None], [length // 2, length // 2, 0, 0], mode="replicate")
    return F.avg_pool2d(side, (1, length), 1)[:, 0].round().to(torch.uint8)


def holed(image):
    side, image = max(1, image.shape[1] // 8), image.clone()
    for y, x in torch.randint(0, image.shape[1] - side, (12, 2)).tolist():
        image[:, y:y + side, x:x + side] = 127
    return image


def framed(image, height, width):
    """Shrunk to these shares of its sides, amid grey."""
    full = image.shape[1:]
    return TF.center_crop(TF.pad(TF.resize(image, [int(full[0] * height), int(full[1] * width)], antialias=True),
                                 [full[1], full[0]], fill=127), full)


def oblique(image):
    height, width = image.shape[1:]
    corners = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    return TF.perspective(image, corners, [[width // 4, height // 4], *corners[1:3], [width // 4, height * 3 // 4]], fill=[127])


SHIFTS = {"dark": lambda image: TF.adjust_gamma(image, 2.0, 0.8), "blurred": blurred, "coarse": coarse, "zoomed": zoomed,
          "noisy": noisy, "warm": tinted(1.25, 1.0, 0.65), "turned": lambda image: TF.rotate(image, 25, fill=[127]),
          "covered": covered, "jpeg": lambda image: TF.jpeg(image, 6), "grey": lambda image: TF.rgb_to_grayscale(image, 3),
          "pale": lambda image: TF.adjust_contrast(TF.adjust_brightness(image, 1.4), 0.5),
          "cool": tinted(0.7, 1.0, 1.25), "green": tinted(0.8, 1.15, 0.8), "hue": lambda image: TF.adjust_hue(image, 0.12),
          "faded": lambda image: TF.adjust_saturation(image, 0.35), "vivid": lambda image: TF.adjust_saturation(image, 2.2),
          "swapped": lambda image: image[[2, 0, 1]], "solarised": lambda image: TF.solarize(image, 128),
          "bright": lambda image: TF.adjust_gamma(image, 0.5), "harsh": lambda image: TF.adjust_contrast(image, 2.0),
          "posterised": lambda image: TF.posterize(image, 2), "sharp": lambda image: TF.adjust_sharpness(image, 6),
          "shadowed": shadowed, "shaken": shaken, "holed": holed, "distant": lambda image: framed(image, 0.6, 0.6),
          "narrow": lambda image: framed(image, 1.0, 0.6), "oblique": oblique,
          "sheared": lambda image: TF.affine(image, 0, [0, 0], 1.0, [20.0, 0.0], fill=[127]),
          "tipped": lambda image: TF.rotate(image, 90), "upended": TF.vertical_flip,
          "corner": lambda image: TF.resized_crop(image, 0, 0, *(side * 7 // 10 for side in image.shape[1:]), image.shape[1:])}
NAMES = list(SHIFTS)
# As they are, altered in one way, in two: each shift with two others.
ALTERATIONS = [(), *((name,) for name in NAMES), *zip(NAMES, NAMES[13:] + NAMES[:13], strict=True)]


def altered_by(names):
    """uint8 [3, H, W] -> the same, altered in the named ways, one after the other; None without names."""
    return v2.Compose([SHIFTS[name] for name in names]) if names else None


class AlteredImages(Images):
    """The images in each of the ALTERATIONS, one alteration after the other."""

    def __init__(self, folder, names, labels, size, how, seed):
        self.count, self.kept = len(names), {}
        super().__init__(folder, [*names] * len(ALTERATIONS), np.tile(labels, len(ALTERATIONS)), size, how, seed=seed)

    def decoded(self, row):  # once a process, not once an alteration
        key = row % self.count, self.size
        if key not in self.kept:
            self.kept[key] = super().decoded(row)
        return self.kept[key]

    def __getitem__(self, row):
        self.augment = altered_by(ALTERATIONS[row // self.count])
        return super().__getitem__(row)

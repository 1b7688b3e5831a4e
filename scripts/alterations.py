"""Known alterations of photographs: scripts/expect.py learns by them how the signs of an error go with errors, and
scripts/bench_expect.py alters test images in the same ways, each left out of what is learned for it."""

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dataset import Images


def noisy(image):
    return (image + 35 * torch.randn(image.shape)).clamp(0, 255).to(torch.uint8)


def warm(image):
    return (image * torch.tensor([1.25, 1.0, 0.65]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8)


def coarse(image):
    height, width = image.shape[1:]
    return TF.resize(TF.resize(image, [max(1, height // 6), max(1, width // 6)], antialias=True), [height, width])


def covered(image):
    return v2.RandomErasing(1.0, (0.3, 0.3), (0.5, 2), value=127)(image)


def zoomed(image):
    return v2.RandomResizedCrop(image.shape[1:], (0.36, 0.36), (1, 1), antialias=True)(image)


def blurred(image):
    return TF.gaussian_blur(image, 2 * (image.shape[1] // 50) + 1, image.shape[1] / 100)


SHIFTS = {"dark": lambda image: TF.adjust_gamma(image, 2.0, 0.8), "blurred": blurred, "coarse": coarse, "zoomed": zoomed,
          "noisy": noisy, "warm": warm, "turned": lambda image: TF.rotate(image, 25, fill=[127]), "covered": covered,
          "jpeg": lambda image: TF.jpeg(image, 6), "grey": lambda image: TF.rgb_to_grayscale(image, 3),
          "pale": lambda image: TF.adjust_contrast(TF.adjust_brightness(image, 1.4), 0.5)}
# As they are, altered in one way, in two.
ALTERATIONS = [(), *((name,) for name in SHIFTS), ("dark", "turned"), ("warm", "blurred"), ("zoomed", "covered"),
               ("jpeg", "dark"), ("pale", "zoomed"), ("grey", "turned"), ("noisy", "blurred"), ("covered", "warm"),
               ("turned", "jpeg"), ("blurred", "pale")]


class Altered:
    """uint8 [3, H, W] -> the same, altered in the named ways, one after the other."""

    def __init__(self, names):
        self.names = names

    def __call__(self, image):
        for name in self.names:
            image = SHIFTS[name](image)
        return image


class AlteredImages(Images):
    """The images in each of the ALTERATIONS, one alteration after the other."""

    def __init__(self, folder, names, labels, size, how, seed):
        self.count = len(names)
        super().__init__(folder, [*names] * len(ALTERATIONS), np.tile(labels, len(ALTERATIONS)), size, how, seed=seed)

    def __getitem__(self, row):
        self.augment = Altered(ALTERATIONS[row // self.count])
        return super().__getitem__(row)
